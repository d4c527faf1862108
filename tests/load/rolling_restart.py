"""
A rolling restart under load: every replica of every service is ended by SIGTERM in turn and started again.

Two workers and two tokenizers behind one client each, as on Kubernetes; the manager has one replica, which requests do
not need. Every answer is compared with the one of the quiet cluster. Prints a table and exits with 1 when a request
failed or was answered wrongly: `make soak-restart`.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import ModelfleetError
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.output import print_table
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole

_SAMPLE = Path(".cache/samples/minilm")
REPLICAS = ("manager", "tokenizer", "tokenizer-2", "inference", "inference-2")
_CALLERS = 8
_TOLERANCE = 1e-5


@dataclass
class Phase:
    """What callers saw while one replica was restarted."""

    restarted: str
    answers: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    restart_s: float = 0.0


async def restart_in_turn(
    folder: Path, *, replicas: Sequence[str] = REPLICAS, rounds: int = 1, rest_s: float = 1.0, callers: int = _CALLERS
) -> list[Phase]:
    """Load a cluster that serves the bundle in `folder`, restart each replica in turn, and return the phases."""
    bundle, paths = open_directory(folder)
    texts = sample_texts(32)
    phases = [Phase("none")]
    stopping = asyncio.Event()
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data), tokenizers=2, workers=2) as cluster:
            addresses = cluster.addresses
            async with AsyncClient(
                inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager, timeout_s=10
            ) as client:
                await client.push(bundle, paths, "minilm", alias="stable")
                await _served_by_all(cluster)
                expected = {text: (await client.embed("minilm", [text])).vectors[0] for text in texts}
                load = [
                    asyncio.create_task(_call(client, expected, phases, stopping, number)) for number in range(callers)
                ]
                await asyncio.sleep(rest_s)
                for _ in range(rounds):
                    for replica in replicas:
                        phases.append(Phase(replica))
                        started = time.monotonic()
                        await asyncio.to_thread(cluster.restart, replica)
                        phases[-1].restart_s = time.monotonic() - started
                        await asyncio.sleep(rest_s)  # the load goes on before the next one leaves
                stopping.set()
                await asyncio.gather(*load)
    return phases


async def _served_by_all(cluster: LocalCluster) -> None:
    for address in cluster.addresses.inference.removeprefix("ipv4:").split(","):
        async with AsyncClient(inference=address) as client:
            await client.wait_until_served("minilm", timeout_s=60)


async def _call(
    client: AsyncClient, expected: dict[str, np.ndarray], phases: list[Phase], stopping: asyncio.Event, number: int
) -> None:
    texts = list(expected)
    position = number
    while not stopping.is_set():
        request = [texts[(position + step) % len(texts)] for step in range(1 + number % 4)]
        position += len(request)
        started = time.monotonic()
        try:
            vectors = (await client.embed("minilm", request)).vectors
        except ModelfleetError as error:
            phases[-1].errors[f"{error.reason}: {error.message}"] += 1
        else:
            phases[-1].answers += 1
            phases[-1].wrong += not np.allclose(vectors, [expected[text] for text in request], atol=_TOLERANCE)
        phases[-1].slowest_s = max(phases[-1].slowest_s, time.monotonic() - started)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each replica is restarted.")] = 5,
    rest: Annotated[float, typer.Option(help="Seconds from one restart to the next.")] = 2.0,
) -> None:
    """Restart every replica of a local cluster in turn, under load."""
    sample = find_sample("minilm")
    if not is_whole(sample, _SAMPLE):
        fetch_sample(sample, _SAMPLE)
    phases = asyncio.run(restart_in_turn(_SAMPLE, rounds=rounds, rest_s=rest))
    rows = []
    for replica in dict.fromkeys(phase.restarted for phase in phases):
        own = [phase for phase in phases if phase.restarted == replica]
        errors = sum((phase.errors for phase in own), Counter[str]())
        rows.append(
            (
                replica,
                len(own) if replica != "none" else 0,
                sum(phase.answers for phase in own),
                sum(phase.wrong for phase in own),
                "; ".join(f"{count} x {error}" for error, count in errors.items()) or "none",
                max(phase.slowest_s for phase in own),
                max(phase.restart_s for phase in own),
            )
        )
    columns = ("replica", "restarts", "answers", "wrong", "errors", "slowest answer, s", "slowest restart, s")
    print_table("Rolling restart under load", columns, rows)
    sys.exit(any(phase.errors or phase.wrong for phase in phases))


if __name__ == "__main__":
    typer.run(main)
