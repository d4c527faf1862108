"""Managers as processes, killed with -9 at every state of a rollout, or while another is there to go on."""

import asyncio
import json
import sqlite3
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
from harness.manager import Manager, connected, running_manager
from harness.obedient_worker import ObedientWorker
from harness.rollouts import alias, start, state_name, state_of, two_versions, until, way
from modelfleet.api.manager.v1 import rollout_service_pb2 as pb

pytestmark = pytest.mark.slow

LEASE_S = 0.5
BEFORE_THE_FLIP = ("PENDING", "LOADING", "CANARY")


@asynccontextmanager
async def process(data_dir: Path, port: int = 0) -> AsyncIterator[tuple[Process, Manager]]:
    command = [sys.executable, "-m", "modelfleet.manager", "--host", "127.0.0.1", "--port", str(port)]
    flags = ["--metrics-port", "0", "--data-dir", str(data_dir), "--leader-lease-s", str(LEASE_S)]
    child = await create_subprocess_exec(*command, *flags, stderr=PIPE)
    try:
        async with asyncio.timeout(30):
            while (entry := json.loads(await child.stderr.readline()))["event"] != "listening":
                pass
        async with connected(f"127.0.0.1:{entry['port']}", data_dir) as manager:
            yield child, manager
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


@asynccontextmanager
async def two_workers(manager: Manager) -> AsyncIterator[list[ObedientWorker]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(ObedientWorker(name).working_for(manager.address)) for name in ("w1", "w2")
        ]


def stored(data_dir: Path) -> tuple[str, int]:
    """Return the state of the rollout and the version of the alias as they are on disk."""
    with closing(sqlite3.connect(data_dir / "manager.db")) as database:
        query = "SELECT state, aliases.model_version FROM rollouts JOIN aliases USING (model, alias)"
        return database.execute(query).fetchone()


def let_somebody_else_lead(data_dir: Path, seconds: float) -> None:
    """Leave a lease that nobody renews; managers wait for its end before they lead."""
    with closing(sqlite3.connect(data_dir / "manager.db")) as database, database:
        database.execute("INSERT OR REPLACE INTO leases VALUES ('leader', 'somebody', 1, ?)", [seconds])


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("PENDING", "SUCCEEDED"),
        ("LOADING", "SUCCEEDED"),
        ("LOADING", "FAILED"),
        ("CANARY", "SUCCEEDED"),
        ("CANARY", "FAILED"),
        ("FLIPPING", "SUCCEEDED"),
        ("DRAINING", "SUCCEEDED"),
    ],
)
async def test_a_manager_killed_at_any_state_goes_on_where_it_was(tmp_path: Path, state: str, end: str) -> None:
    async with running_manager(tmp_path) as manager:
        await two_versions(manager)
    if state == "PENDING":
        let_somebody_else_lead(tmp_path, 1000)
    async with AsyncExitStack() as stack:
        async with process(tmp_path) as (child, manager):
            first, second = await stack.enter_async_context(two_workers(manager))
            second.slow = {2} if state in ("LOADING", "FLIPPING") else set()
            first.lingering = {1} if state == "DRAINING" else set()
            steps = pb.Canary(percents=[50]) if state == "CANARY" else None
            rollout = await start(manager, canary=steps)
            if state == "FLIPPING":  # which lasts as long as a worker does not follow
                await until(manager, rollout, "LOADING", holds=lambda found: found.workers[0].current)
                first.deaf = True
                second.slow = set()
                second.obey()
            await until(manager, rollout, state)
            child.kill()
            await child.wait()
        assert stored(tmp_path) == (state, 1 if state in BEFORE_THE_FLIP else 2)

        if state == "PENDING":
            let_somebody_else_lead(tmp_path, LEASE_S)
        port = int(manager.address.rpartition(":")[2])
        async with process(tmp_path, port) as (_, manager):
            second.slow, second.failing = set(), {2} if end == "FAILED" else set()
            first.lingering, first.deaf = set(), False
            for worker in (first, second):
                worker.obey()
            if state == "CANARY" and end == "SUCCEEDED":
                await manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout))
            done = await until(manager, rollout, end)

            named = 2 if end == "SUCCEEDED" else 1
            assert await alias(manager) == named
            assert len(way(done)) == len(set(way(done)))  # nothing was done twice
            for worker in (first, second):
                await worker.until(lambda worker: worker.held == [named])
                assert worker.routes[0] == {1: 1}
                assert worker.routes[-1] == {named: 1}


async def test_another_manager_goes_on_when_the_leader_is_killed(tmp_path: Path) -> None:
    async with process(tmp_path) as (leader, first), process(tmp_path) as (_, second):
        await two_versions(first)
        async with two_workers(second) as workers:
            # What one manager changes reaches the workers of the other.
            await workers[0].until(lambda worker: worker.routes == [{1: 1}])
            workers[0].slow = {2}
            rollout = await start(second)
            await until(first, rollout, "LOADING")
            await workers[0].until(lambda worker: worker.held == [1, 2])
            leader.kill()
            await leader.wait()
            assert state_name(await state_of(second, rollout)) == "LOADING"  # reads need no leader

            workers[0].slow = set()
            workers[0].obey()

            await until(second, rollout, "SUCCEEDED")
            assert await alias(second) == 2
