"""Latency over throughput, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modelfleet_tools.bench.report import Row


def write_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a PNG with a line for each percentile, each point labelled with its load."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.add_subplot()
    answered = [one for one in rows if one.p50_ms is not None]
    throughputs = [one.texts_per_s for one in answered]
    for name in ("p50", "p90", "p99"):
        axes.plot(throughputs, [getattr(one, f"{name}_ms") for one in answered], marker="o", label=name)
    for one in answered:
        axes.annotate(
            one.load, (one.texts_per_s, one.p99_ms or 0), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="texts/s", ylabel="milliseconds", title=title)
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=130)
