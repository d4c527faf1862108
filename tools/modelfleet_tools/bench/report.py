"""What was measured, as a table, as JSON and as plots."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotille

from modelfleet_tools.bench.load import Measured, OpenLoop
from modelfleet_tools.output import print_table

PERCENTILES = (50, 90, 99, 99.9)
_PLOTTED = ("p50_ms", "p99_ms")


@dataclass(frozen=True, slots=True)
class Row:
    """
    One load's figures.

    Rates are of answered requests over the time until the last answer. `lag_p99_ms` is how late this process sent: when
    it nears the latencies, the client is what is measured, and more of them are needed.
    """

    load: str
    offered_per_s: float | None
    requests: int
    failed: int
    requests_per_s: float
    texts_per_s: float
    tokens_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None
    max_ms: float | None
    lag_p99_ms: float
    errors: dict[str, int]


def row(measured: Measured) -> Row:
    """Return the figures of one load."""
    latencies = 1000 * np.array(measured.latencies_s)
    ranks = [*np.percentile(latencies, PERCENTILES), latencies.max()] if len(latencies) else [None] * 5
    p50, p90, p99, p99_9, most = (None if value is None else round(float(value), 3) for value in ranks)
    failed = measured.errors.total()
    return Row(
        load=str(measured.load),
        offered_per_s=measured.load.rate if isinstance(measured.load, OpenLoop) else None,
        requests=len(latencies) + failed,
        failed=failed,
        requests_per_s=round(len(latencies) / measured.seconds, 2),
        texts_per_s=round(measured.texts / measured.seconds, 2),
        tokens_per_s=round(measured.tokens / measured.seconds, 1),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        p99_9_ms=p99_9,
        max_ms=most,
        lag_p99_ms=round(1000 * float(np.percentile(measured.lags_s, 99)), 3),
        errors=dict(measured.errors),
    )


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print the table."""
    columns = ("load", "requests", "failed", "texts/s", "tokens/s", "p50 ms", "p90", "p99", "p99.9", "max", "lag p99")
    print_table(
        title,
        columns,
        [
            (
                one.load,
                one.requests,
                one.failed and f"{one.failed}: {', '.join(one.errors)}",
                f"{one.texts_per_s:.1f}",
                f"{one.tokens_per_s:.0f}",
                *(_ms(value) for value in (one.p50_ms, one.p90_ms, one.p99_ms, one.p99_9_ms, one.max_ms)),
                _ms(one.lag_p99_ms),
            )
            for one in rows
        ],
    )


def terminal_plot(rows: Sequence[Row], *, color: bool) -> str:
    """Return latency over throughput in characters."""
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = 64, 14, color
    figure.x_label, figure.y_label = "texts/s", "ms"
    figure.register_label_formatter(float, lambda value, chars, **_: f"{value:{chars}.4g}"[:chars])
    figure.set_x_limits(min_=0)
    figure.set_y_limits(min_=0)
    for name in _PLOTTED:
        points = _points(rows, name)
        figure.plot([x for x, _ in points], [y for _, y in points], label=name.removesuffix("_ms"))
    return str(figure.show(legend=True))


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(one.texts_per_s, value) for one in rows if (value := getattr(one, name)) is not None]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
