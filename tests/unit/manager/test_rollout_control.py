"""The loop over a database of either kind, round by round."""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

import pytest
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.manager import rollout_control
from modelfleet.manager.assignments import Assignment, Assignments
from modelfleet.manager.canary import Canary
from modelfleet.manager.leadership import Leadership
from modelfleet.manager.registry import Registry
from modelfleet.manager.rollout_control import RolloutControl
from modelfleet.manager.rollout_decisions import Rollout, RolloutSpec
from modelfleet.manager.rollouts import Rollouts
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow, LeaseRow, WorkerRow
from modelfleet.manager.workers import Traffic, VersionState, VersionStatus, Workers, WorkerStatus
from modelfleet.runtime.errors import StateConflictError
from sqlalchemy import delete

NO_TRAFFIC = Traffic()
READY, WARMING, FAILED = VersionState.READY, VersionState.WARMING, VersionState.FAILED


@dataclass
class Fleet:
    """A manager's parts without its server."""

    database: Database
    registry: Registry
    workers: Workers
    rollouts: Rollouts
    leadership: Leadership
    control: RolloutControl

    async def round(self) -> None:
        await asyncio.to_thread(self.control.round)

    async def assignment(self) -> Assignment:
        async with Assignments(self.database) as assignments:
            return await anext(assignments.watch())

    async def obey(self, *states: VersionState, traffic: Traffic = NO_TRAFFIC) -> Assignment:
        """Let as many workers as there are states follow the newest assignment, with version 2 in these states."""
        assignment = await self.assignment()
        for number, state in enumerate(states):
            held = {version.model_version for version in assignment.model_versions}
            versions = [VersionStatus("pii", 1, VersionState.READY, "")] if 1 in held else []
            versions += [VersionStatus("pii", 2, state, "", traffic=traffic)] if 2 in held else []
            self.workers.report(WorkerStatus(f"w{number}", "pool", assignment.revision, tuple(versions)))
        await self.round()
        return await self.assignment()

    def of(self, number: int) -> Rollout:
        return self.rollouts.get(number).rollout

    def alias(self) -> int:
        return self.registry.model_version(ModelReference.parse("pii")).model_version


@pytest.fixture
async def fleet(database: Database) -> Fleet:
    registry = Registry(database, lambda: None)
    for content in ("1", "2"):
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        with database.writing() as session:
            session.add(BlobRow(sha256=sha256, size=1, create_time=datetime.now(UTC)))
        bundle = Bundle((BundleFile("model.onnx", sha256, 1),), Manifest(task=Task.TENSOR, model="model.onnx"))
        registry.register("pii", bundle, "stable" if content == "1" else None)
    workers = Workers(database, ttl_s=60)
    rollouts = Rollouts(database, workers, lambda: None)
    leadership = Leadership(database, 1000)
    control = RolloutControl(database, workers, leadership, lambda: None)
    return Fleet(database, registry, workers, rollouts, leadership, control)


def shares(assignment: Assignment) -> dict[int, int]:
    return {target.model_version: target.weight for target in assignment.routes[0].targets}


async def test_each_round_goes_as_far_as_reports_allow(fleet: Fleet) -> None:
    spec = RolloutSpec("pii", "stable", 2, canary=Canary((10,)), rollback_window_s=0)
    number = fleet.rollouts.create(spec).rollout.rollout
    await fleet.round()
    assert fleet.of(number).state == "LOADING"
    assert shares(await fleet.assignment()) == {1: 1}

    await fleet.obey(READY, WARMING)
    assert fleet.of(number).state == "LOADING"

    assert shares(await fleet.obey(READY, READY)) == {2: 10, 1: 90}
    await fleet.round()
    assert (fleet.of(number).state, fleet.alias()) == ("CANARY", 1)

    fleet.rollouts.promote(number, full=False)
    assert (fleet.of(number).state, fleet.alias()) == ("FLIPPING", 2)
    assert len((await fleet.assignment()).model_versions) == 2

    after = await fleet.obey(READY, READY)
    assert fleet.of(number).state == "DRAINING"
    assert [version.model_version for version in after.model_versions] == [2]

    await fleet.obey(READY, READY)
    assert fleet.of(number).state == "SUCCEEDED"


async def test_a_report_from_before_the_rollout_says_nothing_about_it(fleet: Fleet) -> None:
    before = await fleet.assignment()
    for state in (READY, FAILED):
        stale = WorkerStatus("w0", "pool", before.revision, (VersionStatus("pii", 2, state, ""),))
        fleet.workers.report(stale)
        number = fleet.rollouts.create(RolloutSpec("pii", "stable", 2)).rollout.rollout
        await fleet.round()
        await fleet.round()

        assert fleet.of(number).state == "LOADING"
        fleet.rollouts.abort(number, "")


async def test_who_no_longer_leads_changes_nothing(fleet: Fleet) -> None:
    number = fleet.rollouts.create(RolloutSpec("pii", "stable", 2)).rollout.rollout
    await fleet.round()
    with fleet.database.writing() as session:
        session.get_one(LeaseRow, "leader").holder = "somebody else"

    await fleet.obey(READY)

    assert fleet.of(number).state == "LOADING"
    assert fleet.alias() == 1


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)], ids=["forth", "back"])
@pytest.mark.parametrize("state", ["LOADING", "CANARY", "FLIPPING"])
async def test_a_wall_clock_that_jumps_ends_neither_loading_nor_a_step_nor_the_rollback_window(
    fleet: Fleet, state: str, jump: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RolloutSpec("pii", "stable", 2, canary=Canary((10,), step_duration_s=600), rollback_window_s=600)
    number = fleet.rollouts.create(spec).rollout.rollout
    await fleet.round()
    if state != "LOADING":
        await fleet.obey(READY)
    if state == "FLIPPING":
        fleet.rollouts.promote(number, full=True)
        await fleet.obey(READY)
    await fleet.round()

    monkeypatch.setattr(rollout_control, "datetime", clock_off_by(jump))
    await fleet.round()

    assert fleet.of(number).state == state


@pytest.mark.parametrize("state", ["CANARY", "FLIPPING"])
async def test_a_version_that_has_taken_all_workers_with_it_goes_no_further(
    fleet: Fleet, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RolloutSpec("pii", "stable", 2, canary=Canary((10,), step_duration_s=1), rollback_window_s=0)
    number = fleet.rollouts.create(spec).rollout.rollout
    await fleet.round()
    await fleet.obey(READY)
    if state == "FLIPPING":
        fleet.rollouts.promote(number, full=True)
    with fleet.database.writing() as session:
        session.execute(delete(WorkerRow))  # silent for too long

    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    await fleet.round()

    assert fleet.of(number).state == state
    if state == "CANARY":
        with pytest.raises(StateConflictError, match="cannot be promoted: no worker reports"):
            fleet.rollouts.promote(number, full=True)


async def test_a_manager_that_takes_over_counts_on_from_when_the_state_was_entered(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = fleet.rollouts.create(RolloutSpec("pii", "stable", 2, loading_timeout_s=60)).rollout.rollout
    await fleet.round()
    monkeypatch.setattr(rollout_control, "datetime", clock_off_by(timedelta(seconds=61)))

    another = RolloutControl(fleet.database, fleet.workers, fleet.leadership, lambda: None)
    await asyncio.to_thread(another.round)

    found = fleet.of(number)
    assert (found.state, found.events[-1].reason) == ("FAILED", "No worker reported within 60 s.")


def clock_off_by(jump: timedelta) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + jump

    return Clock


async def test_a_canary_that_fails_is_taken_back(fleet: Fleet) -> None:
    spec = RolloutSpec("pii", "stable", 2, canary=Canary((10,), max_error_rate=0.1))
    number = fleet.rollouts.create(spec).rollout.rollout
    await fleet.round()
    await fleet.obey(READY, READY)

    after = await fleet.obey(READY, READY, traffic=Traffic(100, 60, (100,)))

    found = fleet.of(number)
    assert (found.state, fleet.alias()) == ("FAILED", 1)
    assert found.events[-1].reason == "The canary failed 120 of 200 requests, 60.00%; max_error_rate is 10.00%."
    assert [version.model_version for version in after.model_versions] == [1]
