"""Workers: what each says it holds, kept in memory; they say it again after a restart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import structlog

from modelfleet.runtime.errors import InvalidInputError

_LONGEST_NAME = 253  # of a pod

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
class VersionStatus:
    """A version on a worker. `reason` says why it FAILED."""

    model: str
    model_version: int
    state: VersionState
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker holds, and the revision of the assignment that it works on."""

    worker: str
    pool: str
    revision: int
    versions: tuple[VersionStatus, ...]


class Workers:
    """The workers that have reported within the last `ttl_s` seconds."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._reports: dict[str, tuple[float, WorkerStatus]] = {}

    @contextmanager
    def watching(self, worker: str, pool: str) -> Iterator[None]:
        """Note that a worker watches assignments until the block ends. Raises InvalidInputError for bad names."""
        _check_names(worker, pool)
        _log.info("worker joined", worker=worker, pool=pool)
        try:
            yield
        finally:
            _log.info("worker left", worker=worker, pool=pool)

    def report(self, status: WorkerStatus) -> None:
        """Take what a worker says. Raises InvalidInputError for bad names."""
        _check_names(status.worker, status.pool)
        self._forget_silent()
        _, before = self._reports.get(status.worker, (0, None))
        self._reports[status.worker] = (self._clock(), status)
        _log_transitions(before, status)

    def current(self) -> tuple[WorkerStatus, ...]:
        """Return the newest report of each worker."""
        oldest = self._clock() - self._ttl_s
        return tuple(status for seen, status in list(self._reports.values()) if seen >= oldest)

    def _forget_silent(self) -> None:
        oldest = self._clock() - self._ttl_s
        for worker, (seen, status) in list(self._reports.items()):
            if seen < oldest:
                del self._reports[worker]
                _log.warning("worker silent", worker=worker, pool=status.pool, ttl_s=self._ttl_s)


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
        if not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidInputError(
                f"{field} is {name[:_LONGEST_NAME]!r}. Give a name of 1 to {_LONGEST_NAME} characters.", field=field
            )
