"""Plots as PNG, for pages and files."""

import base64
import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from modelfleet_tools.evaluate.scores import Calibration, Confusion, LabelScores

_DPI = 110
_MOST_LABELS = 40
_ANNOTATED_LABELS = 12


def data_url(figure: Figure) -> str:
    """Return a figure as a URL that holds the image."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def confusion_plot(confusion: Confusion) -> Figure | None:
    """Return shares of each expected label; none for more labels than an eye can tell apart."""
    size = len(confusion.labels)
    if size > _MOST_LABELS:
        return None
    side = max(4.0, 0.35 * size + 2)
    figure = Figure((side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), confusion.labels, rotation=90)
    axes.set_yticks(range(size), confusion.labels)
    axes.set(xlabel="predicted", ylabel="expected", title="Confusion")
    if size <= _ANNOTATED_LABELS:
        for (row, column), count in np.ndenumerate(confusion.counts):
            colour = "white" if shares[row, column] > 0.5 else "black"  # noqa: PLR2004  half way to dark
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure


def reliability_plot(calibration: Calibration) -> Figure:
    """Return accuracy over confidence; on the diagonal, the model is as often right as it says."""
    figure = Figure((4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.plot(calibration.confidence, calibration.accuracy, marker="o")
    axes.set(
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(0, 1),
        title=f"Reliability, ECE {calibration.error:.3f}",
    )
    return figure


def label_plot(labels: tuple[LabelScores, ...]) -> Figure:
    """Return F1 by label."""
    figure = Figure((6, max(2.0, 0.28 * len(labels) + 1)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([one.label for one in labels], [one.f1 for one in labels])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), title="F1 by label")
    return figure


def latency_plot(latencies_s: NDArray[np.float64]) -> Figure:
    """Return the share of requests that were answered within a time."""
    figure = Figure((6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.ecdf(1000 * latencies_s)
    axes.set(xlabel="milliseconds", ylabel="share of requests", title="Latency")
    return figure
