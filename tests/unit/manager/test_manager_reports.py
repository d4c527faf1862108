from dataclasses import dataclass

from modelfleet.manager.workers import VersionState, VersionStatus, Workers, WorkerStatus
from structlog.testing import capture_logs


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def status(worker: str, state: VersionState = VersionState.READY, reason: str = "") -> WorkerStatus:
    return WorkerStatus(worker, "pool", 1, (VersionStatus("pii", 1, state, reason),))


def test_worker_that_is_silent_for_too_long_is_taken_for_gone() -> None:
    clock = Clock()
    workers = Workers(ttl_s=60, clock=clock)
    workers.report(status("old"))
    clock.now = 59
    workers.report(status("new"))
    assert {report.worker for report in workers.current()} == {"old", "new"}

    clock.now = 61

    assert {report.worker for report in workers.current()} == {"new"}


def test_newest_report_of_a_worker_counts() -> None:
    workers = Workers(ttl_s=60)
    workers.report(status("w", VersionState.WARMING))
    workers.report(status("w", VersionState.READY))
    assert workers.current() == (status("w", VersionState.READY),)


def test_transitions_are_logged_once_and_failures_with_their_reason() -> None:
    workers = Workers(ttl_s=60)
    with capture_logs() as logs:
        for state in (VersionState.WARMING, VersionState.WARMING, VersionState.FAILED):
            workers.report(status("w", state, "no memory" if state is VersionState.FAILED else ""))

    told = [(log["before"], log["state"], log["reason"], log["log_level"]) for log in logs]
    assert told == [(None, "WARMING", "", "info"), ("WARMING", "FAILED", "no memory", "warning")]
