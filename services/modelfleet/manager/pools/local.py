"""Pools of processes: those that `modelfleet up` starts and stops, and workers that others start."""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from modelfleet.manager.pools.pool import Pool, PoolWorker, check_replicas, find_pool
from modelfleet.manager.workers import VersionState, VersionStatus, Workers, WorkerStatus
from modelfleet.runtime.errors import InvalidInputError, StateConflictError


class LocalPools:
    """
    Every worker that reports belongs to the pool that it names.

    `directory` is `modelfleet up`'s: there `wanted.json` has the name of its `pool` and the `replicas` that it shall
    have, written here and read there, and `running.json` the names of its processes, the other way round. Other pools
    shall have as many workers as report.
    """

    def __init__(self, workers: Workers, directory: Path | None) -> None:
        self._workers = workers
        self._directory = directory

    async def run(self) -> None:
        """Wait until cancelled: reports come by themselves."""
        await asyncio.Event().wait()

    async def list(self) -> tuple[Pool, ...]:
        """Return the pools ordered by name."""
        return await asyncio.to_thread(self._list)

    async def scale(self, pool: str, replicas: int) -> Pool:
        """Ask `modelfleet up` for workers, at least one. Raises StateConflictError for other pools' workers."""
        check_replicas(replicas)
        return await asyncio.to_thread(self._scale, pool, replicas)

    def _list(self) -> tuple[Pool, ...]:
        reports = sorted(self._workers.current(), key=lambda report: (report.pool, report.worker))
        pools = {name: _pool(name, map(_worker, group)) for name, group in groupby(reports, key=lambda one: one.pool)}
        for name, replicas in self._wanted().items():
            reported = {worker.worker: worker for worker in pools[name].workers} if name in pools else {}
            pools[name] = replace(_pool(name, self._running(reported)), desired_replicas=replicas)
        return tuple(pools[name] for name in sorted(pools))

    def _scale(self, pool: str, replicas: int) -> Pool:
        found = find_pool(self._list(), pool)
        if self._directory and pool in self._wanted():
            if not replicas:
                raise InvalidInputError("replicas is 0. A pool of `modelfleet up` has at least 1.", field="replicas")
            _write(self._directory / "wanted.json", {"pool": pool, "replicas": replicas})
        elif found.desired_replicas != replicas:
            raise StateConflictError(
                f"The manager did not start the {found.desired_replicas} workers of {pool}, so it cannot make them "
                f"{replicas}. Start or stop workers where they run: `python -m modelfleet.inference --pool {pool}`."
            )
        return replace(found, desired_replicas=replicas)

    def _wanted(self) -> dict[str, int]:
        """Return the pool of `modelfleet up` and how many workers it shall have, empty without one."""
        if self._directory is None:
            return {}
        wanted = json.loads((self._directory / "wanted.json").read_text())
        return {str(wanted["pool"]): int(wanted["replicas"])}

    def _running(self, reported: Mapping[str, PoolWorker]) -> Iterator[PoolWorker]:
        """Yield the workers that run, whether they have reported or not; those that were stopped report no longer."""
        assert self._directory
        for name in sorted(json.loads((self._directory / "running.json").read_text())):
            yield reported.get(name) or PoolWorker(name, ready=False, problem="NotReady: has not reported yet")


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


def _write(path: Path, wanted: dict[str, str | int]) -> None:
    """Replace a file at once: its reader sees the old content or the new."""
    written = path.with_suffix(".new")
    written.write_text(json.dumps(wanted))
    written.replace(path)
