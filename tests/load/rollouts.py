"""
Rollouts one after another under load on two workers, some of them aborted: `make soak-rollouts`.

Callers ask all the while. Each answer says which version gave it; afterwards it is compared with what the alias named
at some moment between the question and the answer, by the events that the manager recorded. Prints a table and exits
with 1 when a request failed or an answer was from a version that the alias did not name.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.client.answers import Rollout
from modelfleet.runtime.errors import ModelfleetError
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole
from rich.console import Console
from rich.table import Table

_SAMPLES = Path(".cache/samples")
_MODEL = "minilm"
_CALLERS = 6
_WORDS = 3  # of each text, for two cores to answer many requests
_TEXTS_IN_PARTS = 300  # more than a client sends in one call
_BATCH_PAUSE_S = 1.0
_STEPS = (20, 50)
_STEP_S = 2.0
_WINDOW_S = 1.0
_CLIENT_TIMEOUT_S = 30
_FOLLOWS_WITHIN_S = 1.0  # an abort returns before the workers have heard of it
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Answer:
    """When a question was asked and answered, in seconds since the epoch, and which version said that it answered."""

    asked: float
    answered: float
    model_version: int
    key: str = ""
    normalized: bool = True


@dataclass
class Load:
    """What callers saw."""

    answers: list[Answer] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def main(
    rollouts: Annotated[int, typer.Option(help="Rollouts that shall succeed.")] = 20,
    aborted: Annotated[int, typer.Option(help="Rollouts that are aborted, spread among them.")] = 5,
) -> None:
    """Roll out and abort under load."""
    load, done = asyncio.run(_soak(rollouts, aborted))
    sys.exit(_judge(load, done, rollouts, aborted))


async def _soak(rollouts: int, aborted: int) -> tuple[Load, list[Rollout]]:
    load = Load()
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data), workers=2) as cluster:
            addresses = cluster.addresses
            async with AsyncClient(
                inference=addresses.inference,
                tokenizer=addresses.tokenizer,
                manager=addresses.manager,
                timeout_s=_CLIENT_TIMEOUT_S,
            ) as client:
                await _push_two(client)
                callers = [asyncio.create_task(_call(client, load, number)) for number in range(_CALLERS)]
                try:
                    done = await _roll_out(client, rollouts, aborted)
                finally:
                    load.stopping.set()
                    await asyncio.gather(*callers)
    return load, done


async def _push_two(client: AsyncClient) -> None:
    """Push the sample as it is, and again as a version whose vectors are not scaled to length 1."""
    folder, sample = _SAMPLES / _MODEL, find_sample(_MODEL)
    if not is_whole(sample, folder):
        fetch_sample(sample, folder)
    bundle, paths = open_directory(folder)
    await client.push(bundle, paths, _MODEL, alias="stable")
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"normalize": not bundle.manifest.normalize}))
    await client.push(other, paths, _MODEL)
    # Ends once both workers have loaded the version.
    await _until_over(client, await client.start_rollout(f"{_MODEL}@both", 1, rollback_window_s=0))
    await client.delete_alias(_MODEL, "both")


async def _call(client: AsyncClient, load: Load, number: int) -> None:
    texts = [" ".join(text.split()[:_WORDS]) for text in sample_texts(_TEXTS_IN_PARTS)]
    turn = number
    while not load.stopping.is_set():
        turn += 1
        # The first caller sends batches in parts, the second asks for fifty users, the others for nobody.
        batch = texts if number == 0 else [texts[turn % len(texts)]]
        key = f"user-{turn % 50}" if number == 1 else ""
        if number == 0:
            await asyncio.sleep(_BATCH_PAUSE_S)
        asked = time.time()
        try:
            answer = await client.embed(_MODEL, batch, affinity_key=key)
        except ModelfleetError as error:
            load.errors[f"{type(error).__name__}: {error.message}"] += 1
            await asyncio.sleep(0.05)
            continue
        lengths = np.linalg.norm(answer.vectors, axis=1)
        normalized = bool(np.allclose(lengths, 1, atol=_TOLERANCE))
        load.answers.append(Answer(asked, time.time(), answer.model_version, key, normalized))


async def _roll_out(client: AsyncClient, rollouts: int, aborted: int) -> list[Rollout]:
    done: list[Rollout] = []
    named = 1
    every = max(1, rollouts // aborted) if aborted else rollouts + 1
    for turn in range(rollouts):
        if turn % every == 0 and turn // every < aborted:
            done.append(await _abort(client, 3 - named, ("LOADING", "CANARY", "FLIPPING")[(turn // every) % 3]))
        named = 3 - named
        percents = _STEPS if turn % 2 else ()
        started = await client.start_rollout(
            _MODEL,
            named,
            canary_percents=percents,
            step_duration_s=_STEP_S if percents else 0,
            rollback_window_s=_WINDOW_S,
        )
        done.append(await _until_over(client, started))
        _say(done[-1])
    return done


async def _abort(client: AsyncClient, model_version: int, state: str) -> Rollout:
    percents = (50,) if state == "CANARY" else ()
    started = await client.start_rollout(_MODEL, model_version, canary_percents=percents, rollback_window_s=60)
    await _until(client, started, lambda rollout: rollout.state == state)
    if state != "LOADING":
        await asyncio.sleep(1)  # of requests in that state
    aborted = await client.abort_rollout(started.rollout, f"in {state}")
    _say(aborted)
    return aborted


async def _until_over(client: AsyncClient, rollout: Rollout) -> Rollout:
    return await _until(client, rollout, lambda found: found.is_over)


async def _until(client: AsyncClient, rollout: Rollout, condition: Callable[[Rollout], bool]) -> Rollout:
    async with asyncio.timeout(120):
        while True:
            found = await client.get_rollout(rollout.rollout)
            if condition(found):
                return found
            assert not found.is_over, found
            await asyncio.sleep(0.05)


def _say(rollout: Rollout) -> None:
    took = (rollout.events[-1].time - rollout.events[0].time).total_seconds()
    way = " ".join(event.state for event in rollout.events)
    typer.echo(f"rollout {rollout.rollout} to {rollout.model_version} in {took:.1f} s: {way}", err=True)


def _judge(load: Load, done: Sequence[Rollout], rollouts: int, aborted: int) -> bool:
    """Print the table and return whether something is wrong."""
    named = _named(done)
    wrong = [answer for answer in load.answers if not _was_named(answer, named)]
    mixed = [answer for answer in load.answers if answer.normalized != (answer.model_version == 1)]
    states = Counter(rollout.state for rollout in done)
    unsteady = _unsteady(load, done)
    times = np.array([answer.answered - answer.asked for answer in load.answers])
    seconds = max(answer.answered for answer in load.answers) - min(answer.asked for answer in load.answers)
    rows: list[tuple[str, object]] = [
        ("rollouts that succeeded", states["SUCCEEDED"]),
        ("rollouts aborted", states["ABORTED"]),
        ("seconds", f"{seconds:.0f}"),
        ("requests answered", len(load.answers)),
        ("requests failed", load.errors.total()),
        ("answers of a version that the alias did not name", len(wrong)),
        ("answers whose vectors are not of the version they name", len(mixed)),
        ("users answered by the old version after the new one in one canary", unsteady),
        *((f"share of the canary at {percent}%", _share(load, done, percent)) for percent in _STEPS),
        ("latest answer of an aborted version", f"{_lateness(load, done) * 1000:.0f} ms after the abort"),
        ("p50, p99 and longest wait", ", ".join(f"{value * 1000:.0f} ms" for value in _waits(times))),
    ]
    table = Table("what", "figure", title=f"{rollouts} rollouts and {aborted} aborted ones under load on two workers")
    for name, value in rows:
        table.add_row(name, str(value))
    Console().print(table)
    for error, count in load.errors.most_common():
        typer.echo(f"{count} x {error}")
    for answer in wrong[:5]:
        typer.echo(f"wrong: {answer}")
    held = states == Counter({"SUCCEEDED": rollouts, "ABORTED": aborted})
    return bool(load.errors or wrong or mixed or unsteady or not held)


def _named(done: Sequence[Rollout]) -> list[tuple[float, float, int]]:
    """Return from when to when the alias named which version."""
    spans: list[tuple[float, float, int]] = []
    since = {1: 0.0}
    for rollout in done:
        for event in rollout.events:
            now = event.time.timestamp()
            if event.state in ("CANARY", "FLIPPING"):
                since.setdefault(rollout.model_version, now)
            elif event.state == "DRAINING":  # every worker follows by now
                spans.append((since.pop(rollout.old_model_version), now, rollout.old_model_version))
            elif event.state == "ABORTED" and rollout.model_version in since:
                end = now + _FOLLOWS_WITHIN_S
                spans.append((since.pop(rollout.model_version), end, rollout.model_version))
    return spans + [(start, float("inf"), number) for number, start in since.items()]


def _was_named(answer: Answer, named: Sequence[tuple[float, float, int]]) -> bool:
    return any(
        number == answer.model_version and start <= answer.answered and answer.asked <= end
        for start, end, number in named
    )


def _unsteady(load: Load, done: Sequence[Rollout]) -> int:
    unsteady = 0
    for rollout in done:
        start, end = _canary_of(rollout)
        had_new: set[str] = set()
        for answer in load.answers:
            if answer.key and start < answer.asked and answer.answered < end:
                if answer.model_version == rollout.model_version:
                    had_new.add(answer.key)
                else:
                    unsteady += answer.key in had_new
    return unsteady


def _canary_of(rollout: Rollout) -> tuple[float, float]:
    times = [event.time.timestamp() for event in rollout.events]
    steps = [index for index, event in enumerate(rollout.events) if event.state == "CANARY"]
    return (times[steps[0]], times[steps[-1] + 1]) if steps else (0.0, 0.0)


def _share(load: Load, done: Sequence[Rollout], percent: int) -> str:
    """Return the canaries' share of the requests without a key at one step, from when the workers follow."""
    new = total = 0
    for rollout in done:
        for event, after in pairwise(rollout.events):
            if event.state == "CANARY" and event.percent == percent and rollout.state == "SUCCEEDED":
                start, end = event.time.timestamp() + 0.2, after.time.timestamp()
                versions = [
                    answer.model_version
                    for answer in load.answers
                    if not answer.key and start < answer.asked and answer.answered < end
                ]
                new += versions.count(rollout.model_version)
                total += len(versions)
    return f"{new / max(1, total):.2%} of {total}"


def _lateness(load: Load, done: Sequence[Rollout]) -> float:
    latest = 0.0
    for rollout in done:
        if rollout.state == "ABORTED":
            end = rollout.events[-1].time.timestamp()
            late = [
                answer.asked - end
                for answer in load.answers
                if answer.model_version == rollout.model_version and end < answer.asked < end + _FOLLOWS_WITHIN_S
            ]
            latest = max([latest, *late])
    return latest


def _waits(times: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    return float(np.percentile(times, 50)), float(np.percentile(times, 99)), float(times.max())


if __name__ == "__main__":
    typer.run(main)
