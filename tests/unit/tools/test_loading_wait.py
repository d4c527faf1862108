"""`push --wait` asks the manager what its workers hold, and says for whom it waits."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from harness.bundle_graphs import write_graph
from harness.manager import running_manager
from harness.obedient_worker import ObedientWorker
from modelfleet_tools import loading_wait
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setenv("MODELFLEET_INFERENCE", "127.0.0.1:1")  # nobody is asked there
    async with running_manager(tmp_path / "data") as running:
        monkeypatch.setenv("MODELFLEET_MANAGER", running.address)
        yield running.address


async def push(folder: Path, *more: str) -> Result:
    write_graph(folder / "model.onnx")
    arguments = ("push", str(folder), "--name", "pii", "--alias", "stable", "--wait", *more)
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, env={"COLUMNS": "200"})


async def test_it_returns_when_a_worker_has_the_version(manager: str, tmp_path: Path) -> None:
    async with ObedientWorker("worker-a").working_for(manager):
        pushed = await push(tmp_path / "model")

    assert (pushed.exit_code, "pii@1 registered; pii@stable names it" in pushed.stdout) == (0, True)


async def test_it_ends_with_what_every_worker_says_that_has_tried(manager: str, tmp_path: Path) -> None:
    async with ObedientWorker("worker-a", failing={1}).working_for(manager):
        pushed = await push(tmp_path / "model")

    assert pushed.exit_code == 1
    assert "pii@1 cannot be served: " in pushed.stderr
    assert "(on worker-a of pool default)" in pushed.stderr


async def test_a_wait_says_for_whom_and_what_it_hears(
    manager: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_wait, "_SILENT_S", 0)
    async with ObedientWorker("worker-a", slow={1}).working_for(manager):
        pushed = await push(tmp_path / "model", "--timeout", "3")

    assert pushed.exit_code == 3
    assert "Waiting for pii@1: worker-a of pool default says WARMING" in pushed.stderr
    assert "pii@1 is not served after 3 s: worker-a of pool default says WARMING" in pushed.stderr


@pytest.mark.usefixtures("manager")
async def test_a_wait_for_nobody_says_so(tmp_path: Path) -> None:
    pushed = await push(tmp_path / "model", "--timeout", "1")

    assert pushed.exit_code == 3
    assert "no worker has taken it up yet; there is none" in pushed.stderr
