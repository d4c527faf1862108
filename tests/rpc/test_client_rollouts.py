"""Rollouts through both clients, against a real manager."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.callers import Caller
from harness.manager import Manager, running_manager
from harness.obedient_worker import ObedientWorker
from harness.rollouts import two_versions, until
from modelfleet.api.manager.v1 import worker_service_pb2 as pb
from modelfleet.client.answers import VersionFigures
from modelfleet.runtime.errors import InvalidInputError, RolloutNotFoundError, StateConflictError


@pytest.fixture(params=[False, True], ids=["threads", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path / "data") as running:
        await two_versions(running)
        yield running


@pytest.fixture
def targets(manager: Manager) -> dict[str, str]:
    return {"manager": manager.address}


@pytest.fixture
async def worker(manager: Manager) -> AsyncIterator[ObedientWorker]:
    async with ObedientWorker("w1").working_for(manager.address) as worker:
        yield worker


async def test_a_rollout_is_started_watched_promoted_and_over(
    call: Caller, manager: Manager, targets: dict[str, str], worker: ObedientWorker
) -> None:
    started = await call(
        targets, "start_rollout", "pii", 2, canary_percents=[10], max_error_rate=0.5, rollback_window_s=0
    )
    assert (started.model, started.alias, started.model_version, started.old_model_version) == ("pii", "stable", 2, 1)
    assert (started.state, started.canary_percents, started.percent) == ("PENDING", (10,), 0)
    await until(manager, started.rollout, "CANARY")
    worker.traffic = {2: pb.Traffic(request_count=4, failure_count=1, latency_counts=[4])}
    worker.obey()
    await until(
        *(manager, started.rollout, "CANARY"),
        holds=lambda found: found.new_figures.request_count > 0 and all(one.current for one in found.workers),
    )

    shown = await call(targets, "get_rollout", started.rollout)
    await call(targets, "promote_rollout", started.rollout)
    await until(manager, started.rollout, "SUCCEEDED")
    (listed,) = await call(targets, "rollouts", "pii@stable")

    assert shown.percent == 10
    assert shown.workers[0].is_ready
    assert shown.new_figures == VersionFigures(4, 1, pytest.approx(0.00099))
    assert (listed.rollout, listed.state, listed.is_over, listed.workers) == (1, "SUCCEEDED", True, ())
    assert [event.state for event in listed.events] == [
        *("PENDING", "LOADING", "CANARY", "FLIPPING", "DRAINING", "SUCCEEDED")
    ]


async def test_an_abort_says_why(call: Caller, targets: dict[str, str]) -> None:
    started = await call(targets, "start_rollout", "pii@stable", 2)
    aborted = await call(targets, "abort_rollout", started.rollout, "no longer wanted")

    assert (aborted.state, aborted.reason, aborted.is_over) == ("ABORTED", "no longer wanted", True)
    with pytest.raises(StateConflictError, match="can no longer be aborted"):
        await call(targets, "abort_rollout", started.rollout)


async def test_lists_end_at_their_limit(call: Caller, targets: dict[str, str]) -> None:
    for _ in range(3):
        started = await call(targets, "start_rollout", "pii", 2)
        await call(targets, "abort_rollout", started.rollout)

    assert [one.rollout for one in await call(targets, "rollouts", limit=2)] == [3, 2]
    assert [one.rollout for one in await call(targets, "rollouts", "pii")] == [3, 2, 1]
    assert await call(targets, "rollouts", "pii@canary") == ()


async def test_errors_are_those_that_the_manager_raised(call: Caller, targets: dict[str, str]) -> None:
    with pytest.raises(RolloutNotFoundError, match="no rollout 7"):
        await call(targets, "get_rollout", 7)
    with pytest.raises(InvalidInputError, match="'pii@2' names no alias"):
        await call(targets, "start_rollout", "pii@2", 1)
    with pytest.raises(InvalidInputError, match="Give canary_percents too"):
        await call(targets, "start_rollout", "pii", 2, max_p99_s=1)
