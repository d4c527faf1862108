"""
Load in a closed loop (callers that wait for their answers) and in an open one (requests that come when they come).

In an open loop, latency counts from when a request was due, also when this process was too busy to send it then: a slow
moment counts for all that it delays. Leaving those out is called coordinated omission:
https://www.youtube.com/watch?v=lJ8ydIuPFeU
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from modelfleet.runtime.errors import ModelfleetError
from numpy.typing import NDArray

from modelfleet_tools.batch.tasks import Ask, Inputs, Result

_SEED = 20260101


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests at random times, `rate` a second on average, whatever the answers: a Poisson process."""

    rate: float

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many callers, each with one request under way."""

    callers: int

    def __str__(self) -> str:
        return f"{self.callers} caller{'s' if self.callers > 1 else ''}"


@dataclass(slots=True)
class Measured:
    """
    What came of one load.

    `latencies_s` are of answered requests; `lags_s` say how much later than due requests were sent, for open loops.
    """

    load: OpenLoop | ClosedLoop
    latencies_s: list[float] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


async def apply_load(
    ask: Ask, requests: Sequence[Sequence[Inputs]], load: OpenLoop | ClosedLoop, seconds: float
) -> Measured:
    """Send requests, over and over, for so many seconds, and wait for all answers."""
    measured = Measured(load)
    endless = cycle(requests)
    started = time.perf_counter()
    if isinstance(load, OpenLoop):
        await _open_loop(ask, endless, measured, arrivals(load.rate, seconds), started)
    else:
        await _closed_loop(ask, endless, measured, load.callers, started + seconds)
    measured.seconds = time.perf_counter() - started
    return measured


def arrivals(rate: float, seconds: float) -> NDArray[np.float64]:
    """Return when requests are due, in seconds from the start: at least one, the same in every run."""
    gaps = np.random.default_rng(_SEED).exponential(1 / rate, max(int(rate * seconds * 1.5) + 20, 1))
    times = np.cumsum(gaps)
    return np.concatenate([times[:1], times[1:][times[1:] < seconds]])


async def _open_loop(
    ask: Ask, requests: Iterator[Sequence[Inputs]], measured: Measured, due: NDArray[np.float64], started: float
) -> None:
    async with asyncio.TaskGroup() as group:
        for offset in due.tolist():
            if (pause := started + offset - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            group.create_task(_send(ask, next(requests), measured, due=started + offset))


async def _closed_loop(
    ask: Ask, requests: Iterator[Sequence[Inputs]], measured: Measured, callers: int, until: float
) -> None:
    async def caller() -> None:
        while (now := time.perf_counter()) < until:
            if pause := await _send(ask, next(requests), measured, due=now):
                await asyncio.sleep(pause)  # a caller whom nobody answers must not spin

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())


async def _send(ask: Ask, request: Sequence[Inputs], measured: Measured, *, due: float) -> float:
    """Return for how many seconds the service wants no more of it."""
    measured.lags_s.append(time.perf_counter() - due)
    try:
        results: list[Result] = await ask(request)
    except ModelfleetError as error:
        measured.errors[error.reason.value] += 1
        return error.retry_after_s or 0.0
    measured.latencies_s.append(time.perf_counter() - due)
    measured.texts += sum(len(inputs.texts) for inputs in request)
    measured.tokens += sum(result.tokens for result in results)
    return 0.0
