"""`modelfleet rollout` in this process, against a real manager and a worker that obeys."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from harness.manager import Manager, running_manager
from harness.obedient_worker import ObedientWorker
from harness.rollouts import alias, start, two_versions, until
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result


async def run(*arguments: str) -> Result:
    """Run the command in a thread, as its client blocks while the services live in this one."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["rollout", *arguments], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep what the services of this process log out of what the command writes."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path / "data") as running:
        monkeypatch.setenv("MODELFLEET_MANAGER", running.address)
        await two_versions(running)
        yield running


@pytest.fixture
async def worker(manager: Manager) -> AsyncIterator[ObedientWorker]:
    async with ObedientWorker("w1").working_for(manager.address) as worker:
        yield worker


@pytest.mark.parametrize("command", ["", "start", "status", "promote", "abort", "list"])
async def test_help_explains_each_command(command: str) -> None:
    shown = await run(*command.split(), "--help")

    assert shown.exit_code == 0
    assert ("xample" if command else "without a failed request") in shown.stdout


@pytest.mark.usefixtures("worker")
async def test_a_start_that_waits_tells_each_state_and_ends_with_0(manager: Manager) -> None:
    shown = await run("start", "pii", "2", "--rollback-window", "0", "--wait")

    assert shown.exit_code == 0, shown.output
    assert await alias(manager) == 2
    told = [line.split()[1] for line in shown.stderr.splitlines()]
    assert told == ["PENDING", "LOADING", "FLIPPING", "DRAINING", "SUCCEEDED"]
    assert "Rollout 1 of pii@stable 1 → 2: SUCCEEDED" in shown.stdout


async def test_a_rollout_that_fails_ends_with_1_and_why(manager: Manager, worker: ObedientWorker) -> None:
    worker.failing = {2}

    shown = await run("start", "pii@stable", "2", "--wait", "--json")

    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["state"] == "FAILED"
    assert "Error: Rollout 1 FAILED: pii@2 failed on worker w1: made to fail" in shown.stderr
    assert await alias(manager) == 1


async def test_a_wait_that_is_too_short_ends_with_3_and_the_rollout_goes_on(
    manager: Manager, worker: ObedientWorker
) -> None:
    worker.slow = {2}

    shown = await run("start", "pii", "2", "--wait", "--wait-timeout", "0.1")

    assert shown.exit_code == 3
    assert "modelfleet rollout status 1 --wait" in shown.stderr
    await until(manager, 1, "LOADING")


@pytest.mark.usefixtures("worker")
async def test_a_canary_is_shown_promoted_and_waited_for(manager: Manager) -> None:
    begun = await run("start", "pii", "2", "--canary", "10", "--canary", "50", "--rollback-window", "0", "--json")
    assert json.loads(begun.stdout)["canary_percents"] == [10, 50]
    await until(manager, 1, "CANARY")

    shown = await run("status", "pii")
    promoted = await run("promote", "pii@stable", "--full", "--wait")

    assert shown.exit_code == 0
    for word in ("CANARY", "10%", "w1", "READY", "This step", "canary"):
        assert word in shown.stdout
    assert promoted.exit_code == 0, promoted.output
    assert await alias(manager) == 2


async def test_an_abort_ends_with_0_and_a_list_shows_it(manager: Manager) -> None:
    await start(manager)

    aborted = await run("abort", "1", "--reason", "labels look odd")
    listed = await run("list", "pii@stable")
    found = await run("list", "--json")

    assert aborted.exit_code == 0
    assert "ABORTED" in aborted.stdout
    for word in ("pii@stable", "1 → 2", "ABORTED", "labels look odd"):
        assert word in listed.stdout
    assert json.loads(found.stdout)["rollouts"][0]["state"] == "ABORTED"


@pytest.mark.usefixtures("manager")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status", "7"], 4, "There is no rollout 7"),
        (["status", "pii"], 4, "There was no rollout of pii@stable yet"),
        (["start", "pii", "9"], 4, "has no version 9"),
        (["start", "pii", "1"], 1, "names version 1 already"),
        (["start", "pii@2", "1"], 1, "names no alias"),
        (["start", "pii", "2", "--max-error-rate", "0.1"], 2, "Add --canary PERCENT"),
        (["start", "pii", "2", "--canary", "100"], 2, "less than or equal to 99"),
    ],
)
async def test_exit_codes_tell_scripts_what_went_wrong(arguments: list[str], code: int, message: str) -> None:
    shown = await run(*arguments)

    assert shown.exit_code == code, shown.output
    assert message in shown.stderr
