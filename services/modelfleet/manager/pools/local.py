"""Pools of workers that others start, such as `modelfleet up`: known by what the workers report."""

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import groupby

from modelfleet.manager.pools.pool import Pool, PoolWorker, check_replicas, find_pool
from modelfleet.manager.workers import VersionState, VersionStatus, Workers, WorkerStatus
from modelfleet.runtime.errors import StateConflictError


class LocalPools:
    """Every worker that reports belongs to the pool that it names, and the pool shall have as many as report."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def run(self) -> None:
        """Wait until cancelled: reports come by themselves."""
        await asyncio.Event().wait()

    async def list(self) -> tuple[Pool, ...]:
        """Return the pools ordered by name."""
        reports = sorted(
            await asyncio.to_thread(self._workers.current), key=lambda report: (report.pool, report.worker)
        )
        return tuple(_pool(name, map(_worker, group)) for name, group in groupby(reports, key=lambda one: one.pool))

    async def scale(self, pool: str, replicas: int) -> Pool:
        """Raise StateConflictError unless the pool has `replicas` workers: they are others' processes."""
        check_replicas(replicas)
        found = find_pool(await self.list(), pool)
        if found.desired_replicas != replicas:
            raise StateConflictError(
                f"The manager did not start the {found.desired_replicas} workers of {pool}, so it cannot make them "
                f"{replicas}. Start or stop workers where they run: `python -m modelfleet.inference --pool {pool}`."
            )
        return found


def _pool(name: str, workers: Iterable[PoolWorker]) -> Pool:
    members = tuple(workers)
    return Pool(name, len(members), sum(worker.ready for worker in members), members, datetime.now(UTC))


def _worker(report: WorkerStatus) -> PoolWorker:
    # A worker serves what it has while it loads more, or fails to.
    ready = not report.versions or any(version.state is VersionState.READY for version in report.versions)
    problem = "" if ready else "; ".join(_state(version) for version in report.versions)
    return PoolWorker(report.worker, ready, problem)


def _state(version: VersionStatus) -> str:
    reason = f", {version.reason}" if version.reason else ""
    return f"{version.model}@{version.model_version} is {version.state}{reason}"
