"""Versions loaded as a worker does it: fetched, held to their golden examples, self-tested, attached to an engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelfleet.inference.assignment import AssignedVersion, VersionKey
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.cache import Cache
from modelfleet.inference.engine import Engine
from modelfleet.inference.loading import Loader
from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.models import LoadedModel
from modelfleet.runtime.memory import available_memory

from harness import graphs


async def load(
    sample: graphs.SampleBundle,
    engine: Engine,
    directory: Path,
    *,
    host_bytes: int = 0,
    limits: BatchLimits = graphs.LIMITS,
) -> LoadedModel:
    """Load m@2; `host_bytes` is the worker's memory, 0 for all there is."""
    budget = MemoryBudget(host_bytes or available_memory(), None)
    loader = Loader(
        Cache(directory / "cache"), sample.download, engine, graphs.cpu_options(directory), limits, budget=budget
    )
    assigned = AssignedVersion(VersionKey("m", 2), sample.bundle)
    await loader.fetch(assigned)
    return await loader.load(assigned, lambda _: None)


@asynccontextmanager
async def running_engine(max_queue_tokens: int = 1000) -> AsyncIterator[Engine]:
    """Run an engine of one lane until the block ends."""
    engine = Engine(lanes=1, max_queue_tokens=max_queue_tokens)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)
