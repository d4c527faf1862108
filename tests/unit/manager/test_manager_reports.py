from dataclasses import dataclass, replace

import pytest
from modelfleet.manager.store.database import Database
from modelfleet.manager.workers import SessionMemory, Traffic, VersionState, VersionStatus, Workers, WorkerStatus
from structlog.testing import capture_logs


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def status(worker: str, state: VersionState = VersionState.READY, reason: str = "") -> WorkerStatus:
    return WorkerStatus(worker, "pool", 1, (VersionStatus("pii", 1, state, reason),))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(database: Database, clock: Clock) -> Workers:
    return Workers(database, ttl_s=60, clock=clock)


def names(workers: Workers) -> set[str]:
    return {report.worker for report in workers.current()}


def test_worker_that_is_silent_for_too_long_is_taken_for_gone(workers: Workers, clock: Clock) -> None:
    workers.report(status("old"))
    assert names(workers) == {"old"}
    clock.now = 59
    workers.report(status("new"))
    assert names(workers) == {"old", "new"}

    clock.now = 61

    assert names(workers) == {"new"}


def test_silent_worker_is_forgotten_by_all_managers_and_may_come_back(
    database: Database, workers: Workers, clock: Clock
) -> None:
    workers.report(status("w"))
    assert names(workers) == {"w"}
    clock.now = 61

    workers.forget_silent()

    assert names(Workers(database, ttl_s=60)) == set()
    workers.report(status("w"))
    assert names(workers) == {"w"}


def test_manager_that_starts_knows_the_workers_from_before_and_waits_for_them(database: Database) -> None:
    Workers(database, ttl_s=60).report(status("w"))
    clock = Clock(1e6)

    started = Workers(database, ttl_s=60, clock=clock)

    assert names(started) == {"w"}
    clock.now += 61
    assert names(started) == set()


def test_report_to_one_manager_is_news_to_another(database: Database, workers: Workers, clock: Clock) -> None:
    other = Workers(database, ttl_s=60)
    other.report(status("w"))
    assert names(workers) == {"w"}
    clock.now = 50
    other.report(status("w", VersionState.FAILED, "no memory"))
    assert workers.current() == (status("w", VersionState.FAILED, "no memory"),)

    clock.now = 109

    assert names(workers) == {"w"}


def test_newest_report_of_a_worker_counts_with_all_that_it_says(workers: Workers) -> None:
    workers.report(status("w", VersionState.WARMING))
    told = VersionStatus(
        "pii", 1, VersionState.READY, "", ("CPU",), SessionMemory(1, 2, 3, 4), Traffic(9, 1, (3, 4, 2))
    )
    workers.report(replace(status("w"), versions=(told,)))

    (found,) = workers.current()

    assert found.versions == (told,)
    assert found.version("pii", 1) == told
    assert found.version("pii", 2) is None


def test_transitions_are_logged_once_and_failures_with_their_reason(workers: Workers) -> None:
    with capture_logs() as logs:
        for state in (VersionState.WARMING, VersionState.WARMING, VersionState.FAILED):
            workers.report(status("w", state, "no memory" if state is VersionState.FAILED else ""))

    told = [(log["before"], log["state"], log["reason"], log["log_level"]) for log in logs]
    assert told == [(None, "WARMING", "", "info"), ("WARMING", "FAILED", "no memory", "warning")]
