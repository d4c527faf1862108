"""Workers: what each says it holds, kept in the database, so that all managers know and none forgets it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import structlog
from sqlalchemy import delete, select

from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import WorkerRow
from modelfleet.runtime.errors import InvalidInputError

LONGEST_NAME = 253
"""Most characters in the name of a worker or a pool, as of a pod."""

_log = structlog.get_logger()


class VersionState(StrEnum):
    """Where a model version is in its life on a worker."""

    DOWNLOADING = "DOWNLOADING"
    VERIFYING = "VERIFYING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """Memory that a version takes, in bytes; peaks are what the largest batch adds. 0 where it is not known."""

    host_bytes: int = 0
    host_peak_bytes: int = 0
    device_bytes: int = 0
    device_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests that ended, those that failed, and requests by latency: the i-th count is up to 2^i milliseconds."""

    request_count: int = 0
    failure_count: int = 0
    latency_counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version on a worker. `reason` says why it FAILED; `traffic` counts since it became READY."""

    model: str
    model_version: int
    state: VersionState
    reason: str
    providers: tuple[str, ...] = ()
    memory: SessionMemory = SessionMemory()
    traffic: Traffic = Traffic()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker holds, and the revision of the assignment that it works on."""

    worker: str
    pool: str
    revision: int
    versions: tuple[VersionStatus, ...]

    def version(self, model: str, model_version: int) -> VersionStatus | None:
        """Return a version's status, None where the worker does not hold it."""
        wanted = (model, model_version)
        return next((status for status in self.versions if (status.model, status.model_version) == wanted), None)


class Workers:
    """
    The workers that reported within the last `ttl_s` seconds, to whichever manager. Blocking: call it from threads.

    Silence is measured on this manager's own monotonic clock, from when it first saw the report: clocks that differ or
    jump make no worker vanish, and a manager that has just started waits for workers that it knows from before.
    """

    def __init__(
        self,
        database: Database,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listeners: list[Callable[[], None]] = []
        self._database = database
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[tuple[int, datetime], float]] = {}  # which report, and when that was news

    def on_report(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after each report that this manager takes, from whichever thread."""
        self._listeners.append(listener)

    @contextmanager
    def watching(self, worker: str, pool: str) -> Iterator[None]:
        """
        Note that a worker watches assignments until the block ends; onlookers have neither name.

        Raises InvalidInputError for bad names.
        """
        if not worker and not pool:
            yield
            return
        _check_names(worker, pool)
        _log.info("worker joined", worker=worker, pool=pool)
        try:
            yield
        finally:
            _log.info("worker left", worker=worker, pool=pool)

    def report(self, status: WorkerStatus) -> None:
        """Take what a worker says. Raises InvalidInputError for bad names."""
        _check_names(status.worker, status.pool)
        versions = json.dumps([asdict(version) for version in status.versions])
        with self._database.writing() as session:
            row = session.get(WorkerRow, status.worker)
            before = None if row is None else _status(row)
            if row is None:
                row = WorkerRow(worker=status.worker, report_count=0)
                session.add(row)
            row.pool, row.revision, row.versions_json = status.pool, status.revision, versions
            row.report_count += 1
            row.report_time = datetime.now(UTC)
        _log_transitions(before, status)
        for listener in self._listeners:
            listener()

    def current(self) -> tuple[WorkerStatus, ...]:
        """Return the newest report of each worker that is not silent, ordered by name."""
        with self._database.reading() as session:
            rows = session.scalars(select(WorkerRow).order_by(WorkerRow.worker))
            reports = [(_status(row), (row.report_count, row.report_time)) for row in rows]
        now = self._clock()
        with self._lock:
            before, self._seen = self._seen, {}
            for status, report in reports:
                known, seen = before.get(status.worker, (None, now))
                self._seen[status.worker] = (report, seen if known == report else now)
            return tuple(status for status, _ in reports if now - self._seen[status.worker][1] < self._ttl_s)

    def forget_silent(self) -> None:
        """Forget the workers that are silent, for all managers. The leading manager does so."""
        live = {status.worker for status in self.current()}
        with self._lock:
            silent = {worker: report for worker, (report, _) in self._seen.items() if worker not in live}
        if not silent:
            return
        with self._database.writing() as session:
            for worker, (count, _) in silent.items():
                session.execute(delete(WorkerRow).filter_by(worker=worker, report_count=count))
        for worker in silent:
            _log.warning("worker silent", worker=worker, ttl_s=self._ttl_s)


def _status(row: WorkerRow) -> WorkerStatus:
    versions = tuple(_version_status(values) for values in json.loads(row.versions_json))
    return WorkerStatus(row.worker, row.pool, row.revision, versions)


def _version_status(values: dict[str, Any]) -> VersionStatus:
    traffic = values.pop("traffic")
    return VersionStatus(
        **values
        | {
            "state": VersionState(values["state"]),
            "providers": tuple(values["providers"]),
            "memory": SessionMemory(**values["memory"]),
            "traffic": Traffic(**traffic | {"latency_counts": tuple(traffic["latency_counts"])}),
        }
    )


def _log_transitions(before: WorkerStatus | None, after: WorkerStatus) -> None:
    states = {(version.model, version.model_version): version.state for version in before.versions} if before else {}
    for version in after.versions:
        old = states.get((version.model, version.model_version))
        if old is not version.state:
            log = _log.warning if version.state is VersionState.FAILED else _log.info
            log(
                "version state",
                worker=after.worker,
                model=version.model,
                model_version=version.model_version,
                state=version.state,
                before=old,
                reason=version.reason,
            )


def _check_names(worker: str, pool: str) -> None:
    for field, name in (("worker", worker), ("pool", pool)):
        if not 0 < len(name) <= LONGEST_NAME:
            raise InvalidInputError(
                f"{field} is {name[:LONGEST_NAME]!r}. Give a name of 1 to {LONGEST_NAME} characters.", field=field
            )
