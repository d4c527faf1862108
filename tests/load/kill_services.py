"""
Load on a local cluster while each service in turn is killed with -9 and started again: `make soak`.

Every answer is compared with the one that the quiet cluster gave. Prints counts of answers and of errors by code, and
exits with 1 when an answer was wrong or when nothing was answered between two kills.
"""

import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import ModelfleetError
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster, Service
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole
from rich.console import Console
from rich.table import Table

_SAMPLES = Path(".cache/samples")
_CALLERS = 8
_TEXTS = 64
_TOLERANCE = 1e-5
_PAUSE_AFTER_ERROR_S = 0.05


@dataclass
class Tally:
    """What callers saw in one phase."""

    answers: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    longest_gap_s: float = 0.0
    last_answer: float = field(default_factory=time.monotonic)

    def answered(self, *, right: bool) -> None:
        """Count an answer, and how long callers had to do without one."""
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self.last_answer)
        self.last_answer = now
        self.answers += 1
        self.wrong += not right


def main(
    seconds: Annotated[float, typer.Option(help="How long to load the cluster.")] = 600,
    kill_every: Annotated[float, typer.Option(help="Seconds from one kill to the next.")] = 15,
) -> None:
    """Load a local cluster while its services are killed."""
    tallies = asyncio.run(_soak(seconds, kill_every))
    _print(tallies)
    sys.exit(any(tally.wrong or not tally.answers for _, tally in tallies))


async def _soak(seconds: float, kill_every: float) -> list[tuple[str, Tally]]:
    texts = sample_texts(_TEXTS)
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster:
            addresses = cluster.addresses
            async with AsyncClient(
                inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager, timeout_s=10
            ) as client:
                await _push(client)
                expected = {text: (await client.embed("minilm", [text])).vectors[0] for text in texts}
                tallies = [("nothing", Tally())]
                stopping = asyncio.Event()
                callers = [
                    asyncio.create_task(_call(client, texts, expected, tallies, stopping=stopping, number=number))
                    for number in range(_CALLERS)
                ]
                await _kill_in_turn(cluster, tallies, seconds, kill_every)
                stopping.set()
                await asyncio.gather(*callers)
    return tallies


async def _push(client: AsyncClient) -> None:
    folder, sample = _SAMPLES / "minilm", find_sample("minilm")
    if not is_whole(sample, folder):
        fetch_sample(sample, folder)
    bundle, paths = open_directory(folder)
    await client.push(bundle, paths, "minilm", alias="stable")
    await client.wait_until_served("minilm", timeout_s=60)


async def _call(
    client: AsyncClient,
    texts: list[str],
    expected: dict[str, np.ndarray],
    tallies: list[tuple[str, Tally]],
    *,
    stopping: asyncio.Event,
    number: int,
) -> None:
    position = number
    while not stopping.is_set():
        request = [texts[(position + step) % len(texts)] for step in range(1 + number)]
        position += len(request)
        try:
            vectors = (await client.embed("minilm", request)).vectors
        except ModelfleetError as error:
            tallies[-1][1].errors[f"{error.__cause__.code().name} {type(error).__name__}"] += 1
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
        else:
            right = np.allclose(vectors, [expected[text] for text in request], atol=_TOLERANCE)
            tallies[-1][1].answered(right=right)


async def _kill_in_turn(
    cluster: LocalCluster, tallies: list[tuple[str, Tally]], seconds: float, kill_every: float
) -> None:
    deadline = time.monotonic() + seconds
    turn = 0
    order = tuple(Service)
    await asyncio.sleep(kill_every)
    while time.monotonic() < deadline:
        service = order[turn % len(order)]
        turn += 1
        tallies.append((service.value, Tally()))
        cluster.kill(service, signal.SIGKILL)
        await asyncio.to_thread(cluster.wait_for_exit, service)
        await asyncio.to_thread(cluster.restart, service)
        await asyncio.sleep(kill_every)


def _print(tallies: list[tuple[str, Tally]]) -> None:
    table = Table(title="Load while services are killed with -9 and started again")
    for heading in ("killed", "kills", "answers", "wrong", "errors by code and kind", "longest gap, s"):
        table.add_column(heading)
    for service in dict.fromkeys(name for name, _ in tallies):
        own = [tally for name, tally in tallies if name == service]
        errors = sum((tally.errors for tally in own), Counter[str]())
        table.add_row(
            service,
            str(len(own)),
            str(sum(tally.answers for tally in own)),
            str(sum(tally.wrong for tally in own)),
            ", ".join(f"{count} {code}" for code, count in errors.most_common()) or "none",
            f"{max(tally.longest_gap_s for tally in own):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
