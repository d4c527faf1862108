"""How a run goes: a bar on a terminal, else a line now and then; and what it did in the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from modelfleet_tools.batch.checkpoint import Checkpoint
from modelfleet_tools.output import tell

_LINE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Summary:
    """
    What a run did. `rows`, `done`, `failed`, `tokens` and `seconds` are of the whole run, also before it was resumed.

    The rates, `retries` and `most_requests` are of this process.
    """

    model: str
    rows: int
    done: int
    failed: int
    tokens: int
    truncated: int
    seconds: float
    rows_per_s: float
    tokens_per_s: float
    retries: int
    most_requests: int
    output: str
    errors: str | None


class Meter:
    """Rates since this process began, and how long the rest will take."""

    def __init__(self, begun: Checkpoint, fraction_read: Callable[[], float]) -> None:
        self._begun = begun
        self._fraction_read = fraction_read
        self._start = time.monotonic()
        self.taken = begun.done + begun.failed
        """Rows read so far, also those not yet answered."""

    @property
    def seconds(self) -> float:
        """How long this process has run."""
        return time.monotonic() - self._start

    def rates(self, now: Checkpoint) -> tuple[float, float]:
        """Return rows and tokens a second."""
        seconds = max(self.seconds, 1e-9)
        rows = now.done + now.failed - self._begun.done - self._begun.failed
        return rows / seconds, (now.tokens - self._begun.tokens) / seconds

    def share(self, now: Checkpoint) -> float:
        """Return how much of the rows is done, 0 to 1; the number of rows is estimated from the bytes read."""
        return (now.done + now.failed) / max(self.taken, 1) * self._fraction_read()

    def line(self, now: Checkpoint) -> str:
        """Return it in words."""
        rows_per_s, tokens_per_s = self.rates(now)
        share, begun = self.share(now), self._begun.done + self._begun.failed
        rows = now.done + now.failed
        left = (rows / share - rows) / rows_per_s if share and rows > begun else None
        return (
            f"{rows:,} rows, {now.failed:,} failed, {rows_per_s:,.0f} rows/s, {tokens_per_s:,.0f} tokens/s, "
            f"{share:.0%}, {_clock(left)} left"
        )


@contextmanager
def shown(meter: Meter) -> Iterator[Callable[[Checkpoint], None]]:
    """Yield what shows a new checkpoint to whoever watches."""
    console = Console(stderr=True)
    last = time.monotonic()
    with Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0)

        def show(now: Checkpoint) -> None:
            nonlocal last
            if console.is_terminal:
                bar.update(task, completed=meter.share(now), description=meter.line(now))
            elif time.monotonic() - last > _LINE_EVERY_S:
                last = time.monotonic()
                tell(meter.line(now))

        yield show


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
