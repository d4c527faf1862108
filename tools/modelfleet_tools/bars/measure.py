"""The measurements. Every round takes each of them once, so that a slow moment of the machine falls on all alike."""

import asyncio
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelfleet.client import AsyncClient, Client
from rich.progress import Progress

from modelfleet_tools.bars.baseline import Baseline

MODEL = "minilm"
_SINGLE_CALLS = 40


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: so many callers, each with so many texts in a request."""

    name: str
    callers: int
    texts: int
    goal: float


LOADS = (
    Load("Embed, 1 text a request, 16 callers: texts/s over R1", callers=16, texts=1, goal=0.80),
    Load("Embed, 1 text a request, 64 callers: texts/s over R1", callers=64, texts=1, goal=0.85),
    Load("Embed, 32 texts a request, 2 callers: texts/s over R1", callers=2, texts=32, goal=0.92),
)
PADDING_LOAD = LOADS[1]


@dataclass(frozen=True, slots=True)
class Clients:
    """The same cluster for many callers at once, and for one."""

    many: AsyncClient
    one: Client


@dataclass(frozen=True, slots=True)
class Round:
    """
    One turn of every measurement.

    `baseline` and `loads` are texts a second. Each load's ratio is over the mean of the baselines right before and
    after it, since a shared machine is not equally fast for long. The latencies are medians in seconds.
    """

    baseline: float
    loads: dict[str, float]
    ratios: dict[str, float]
    padding_efficiency: float
    single_baseline_s: float
    single_cluster_s: float


async def measure(
    clients: Clients, baseline: Baseline, texts: Sequence[str], metrics_url: str, rounds: int
) -> list[Round]:
    """Return what each round measured, after one round that only warms up."""
    ids = baseline.sorted_ids(texts)
    with Progress(transient=True) as progress:
        measured = [
            await _round(clients, baseline, ids, texts, metrics_url)
            for _ in progress.track(range(rounds + 1), description="Measuring")
        ]
    return measured[1:]


async def _round(
    clients: Clients, baseline: Baseline, ids: Sequence[Sequence[int]], texts: Sequence[str], metrics_url: str
) -> Round:
    baselines = [_baseline_rate(baseline, ids)]
    rates, ratios = {}, {}
    padding_efficiency = 0.0
    for load in LOADS:
        before = _tokens(metrics_url)
        rates[load.name] = await _closed_loop(clients.many, load, texts)
        if load is PADDING_LOAD:
            real, padded = (now - then for now, then in zip(_tokens(metrics_url), before, strict=True))
            padding_efficiency = real / padded
        baselines.append(_baseline_rate(baseline, ids))
        ratios[load.name] = rates[load.name] / statistics.mean(baselines[-2:])
    # In blocks and not in turns: the threads of an in-process session spin for a while after each run.
    singles = texts[:_SINGLE_CALLS]
    in_process = _median_seconds(baseline.embed_one, singles)
    in_cluster = _median_seconds(lambda text: clients.one.embed(MODEL, [text]), singles)
    return Round(statistics.mean(baselines), rates, ratios, padding_efficiency, in_process, in_cluster)


def _baseline_rate(baseline: Baseline, ids: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    baseline.run_sorted(ids)
    return len(ids) / (time.perf_counter() - started)


def _median_seconds(call: Callable[[str], object], texts: Sequence[str]) -> float:
    taken = []
    for text in texts:
        started = time.perf_counter()
        call(text)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


async def _closed_loop(client: AsyncClient, load: Load, texts: Sequence[str]) -> float:
    """Return texts a second. All texts are sent once, by callers that each wait for an answer before the next."""
    # One iterator for all callers: whoever is free takes the next.
    requests = (texts[first : first + load.texts] for first in range(0, len(texts), load.texts))

    async def caller() -> None:
        for request in requests:
            await client.embed(MODEL, request)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(load.callers)))
    return len(texts) / (time.perf_counter() - started)


def _tokens(metrics_url: str) -> tuple[float, float]:
    """Return the real and the padded tokens that the worker has run so far."""
    with urllib.request.urlopen(metrics_url) as response:  # noqa: S310  a URL of the cluster that was started here
        lines = response.read().decode().splitlines()
    return tuple(  # type: ignore[return-value]  # two names, two sums
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))
        for name in ("modelfleet_tokens_total", "modelfleet_padded_tokens_total")
    )
