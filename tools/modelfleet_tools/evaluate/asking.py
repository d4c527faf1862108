"""The model's answers to all examples, and how long each request took."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import OverloadedError
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from modelfleet_tools.batch.tasks import Ask, Options, Result, asker
from modelfleet_tools.evaluate.examples import Example


@dataclass(frozen=True, slots=True)
class Answers:
    """`results` are in order of the examples; `latencies_s` is float64 [requests]; `seconds` is the whole time."""

    results: tuple[Result, ...]
    latencies_s: NDArray[np.float64]
    seconds: float


async def ask_all(
    client: AsyncClient,
    model: str,
    task: str,
    examples: Sequence[Example],
    options: Options,
    *,
    callers: int,
    texts_per_request: int,
    timeout_s: float,
) -> Answers:
    """Ask with so many requests under way at once. A full queue is waited for; any other error ends it."""
    ask = asker(client, task, model, options, timeout_s)
    results: dict[int, list[Result]] = {}
    latencies: list[float] = []
    starts = iter(range(0, len(examples), texts_per_request))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(f"Asking {model}", total=len(examples))

        async def caller() -> None:
            for start in starts:
                part = examples[start : start + texts_per_request]
                results[start], latency = await _patiently(ask, part, timeout_s)
                latencies.append(latency)
                bar.advance(shown, len(part))

        begun = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(callers):
                    group.create_task(caller())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        seconds = time.perf_counter() - begun
    return Answers(tuple(one for start in sorted(results) for one in results[start]), np.array(latencies), seconds)


async def _patiently(ask: Ask, part: Sequence[Example], patience_s: float) -> tuple[list[Result], float]:
    """Return the results and the latency of the request that was taken. Raises OverloadedError when none is in time."""
    first = time.perf_counter()
    while True:
        sent = time.perf_counter()
        try:
            return await ask([example.inputs for example in part]), time.perf_counter() - sent
        except OverloadedError as error:
            pause = error.retry_after_s or 1.0
            if sent + pause - first > patience_s:
                raise
            await asyncio.sleep(pause)
