"""Callers of the sample `minilm` who ask all the while something is done to the cluster, and what they saw."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import ModelfleetError
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole

MODEL = "minilm"
COLUMNS = ("what was done", "times", "answers", "wrong", "errors", "slowest answer, s", "longest gap, s")


_SAMPLE = Path(".cache/samples/minilm")
_TEXTS = 64
_TOLERANCE = 1e-5
_PAUSE_AFTER_ERROR_S = 0.05


@dataclass
class Phase:
    """What callers saw while something was done to the cluster. Several of one name are shown as one."""

    name: str
    answers: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    longest_gap_s: float = 0.0
    last_answer: float = field(default_factory=time.monotonic)

    def answered(self, *, right: bool, seconds: float) -> None:
        """Count an answer that took `seconds`, and how long callers had to do without one."""
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self.last_answer)
        self.last_answer = now
        self.answers += 1
        self.wrong += not right
        self.slowest_s = max(self.slowest_s, seconds)


class Load:
    """Phases one after another; what callers see counts for the last."""

    def __init__(self, expected: Mapping[str, np.ndarray]) -> None:
        self.expected = expected
        self.phases: list[Phase] = []

    def begin(self, name: str) -> Phase:
        """Begin a phase."""
        self.phases.append(Phase(name))
        return self.phases[-1]

    @asynccontextmanager
    async def callers(self, client: AsyncClient, count: int) -> AsyncIterator[None]:
        """Have callers ask until the block ends."""
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._call(client, stopping, number))
            try:
                yield
            finally:
                stopping.set()

    async def _call(self, client: AsyncClient, stopping: asyncio.Event, number: int) -> None:
        texts = list(self.expected)
        position = number
        while not stopping.is_set():
            request = [texts[(position + step) % len(texts)] for step in range(1 + number)]
            position += len(request)
            started = time.monotonic()
            try:
                vectors = (await client.embed(MODEL, request)).vectors
            except ModelfleetError as error:
                self.phases[-1].errors[f"{error.__cause__.code().name} {type(error).__name__}"] += 1
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
            else:
                right = np.allclose(vectors, [self.expected[text] for text in request], atol=_TOLERANCE)
                self.phases[-1].answered(right=right, seconds=time.monotonic() - started)

    def rows(self) -> list[tuple[str, int, int, int, str, float, float]]:
        """Return for each name: phases, answers, wrong ones, errors, the slowest answer and the longest gap in s."""
        return [_row(name, [phase for phase in self.phases if phase.name == name]) for name in self._names()]

    def _names(self) -> Sequence[str]:
        return tuple(dict.fromkeys(phase.name for phase in self.phases))


def _row(name: str, phases: Sequence[Phase]) -> tuple[str, int, int, int, str, float, float]:
    errors = sum((phase.errors for phase in phases), Counter[str]())
    return (
        name,
        len(phases),
        sum(phase.answers for phase in phases),
        sum(phase.wrong for phase in phases),
        ", ".join(f"{count} {error}" for error, count in errors.most_common()) or "none",
        max(phase.slowest_s for phase in phases),
        max(phase.longest_gap_s for phase in phases),
    )


@asynccontextmanager
async def client_of(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    """Give a client of the whole cluster that waits up to 10 s."""
    addresses = cluster.addresses
    async with AsyncClient(
        inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager, timeout_s=10
    ) as client:
        yield client


async def push_sample(client: AsyncClient, cluster: LocalCluster) -> None:
    """Push the sample and return once every worker serves it."""
    sample = find_sample(MODEL)
    if not is_whole(sample, _SAMPLE):
        fetch_sample(sample, _SAMPLE)
    bundle, paths = open_directory(_SAMPLE)
    await client.push(bundle, paths, MODEL, alias="stable")
    for address in cluster.addresses.inference.removeprefix("ipv4:").split(","):
        async with AsyncClient(inference=address) as one:
            await one.wait_until_served(MODEL, timeout_s=60)


async def expected_answers(client: AsyncClient) -> dict[str, np.ndarray]:
    """Return what a cluster at rest answers, by text."""
    return {text: (await client.embed(MODEL, [text])).vectors[0] for text in sample_texts(_TEXTS)}
