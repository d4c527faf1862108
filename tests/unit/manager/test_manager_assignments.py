"""What keeps the newest assignment lives through whatever it reads."""

import asyncio
import hashlib
from datetime import UTC, datetime

import pytest
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.manager import assignments as assignments_module
from modelfleet.manager.assignments import Assignments
from modelfleet.manager.canary import Canary
from modelfleet.manager.registry import Registry
from modelfleet.manager.rollout_decisions import Next, RolloutSpec
from modelfleet.manager.rollout_states import RolloutState
from modelfleet.manager.rollouts import Rollouts, enter
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow, RolloutRow
from modelfleet.manager.workers import Workers
from structlog.testing import capture_logs


def register(database: Database, registry: Registry, content: str, alias: str | None) -> None:
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    with database.writing() as session:
        session.add(BlobRow(sha256=sha256, size=1, create_time=datetime.now(UTC)))
    bundle = Bundle((BundleFile("model.onnx", sha256, 1),), Manifest(task=Task.TENSOR, model="model.onnx"))
    registry.register("pii", bundle, alias)


async def test_a_rollout_that_a_newer_release_wrote_holds_changes_up_only_while_it_is_there(
    database: Database, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments_module, "_RETRY_S", 0.01)
    register(database, registry, "1", "stable")
    register(database, registry, "2", None)
    rollouts = Rollouts(database, Workers(database, ttl_s=60), lambda: None)
    async with Assignments(database) as assignments, asyncio.timeout(10):
        watch = assignments.watch()
        first = await anext(watch)
        number = rollouts.create(RolloutSpec("pii", "stable", 2, canary=Canary((10,)))).rollout.rollout
        with database.writing() as session:
            row = session.get_one(RolloutRow, number)
            for state in (RolloutState.LOADING, RolloutState.CANARY):
                enter(session, row, Next(state), ())
            known, row.spec_json = row.spec_json, row.spec_json.replace("{", '{"of_tomorrow": 1, ', 1)
        with capture_logs() as logs:
            assignments.changed()
            while not any(entry["event"] == "assignment not read" for entry in logs):  # noqa: ASYNC110  a log of a task
                await asyncio.sleep(0.01)

        with database.writing() as session:
            session.get_one(RolloutRow, number).spec_json = known

        assert (await anext(watch)).revision == first.revision + 2
