"""What takes something out of service wants consent, and says what it replaces."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import structlog
from harness import graphs
from harness.manager import running_manager
from modelfleet_tools import consent
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result


async def run(*arguments: str, answer: str = "") -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, input=answer, env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep what the manager of this process logs out of what the command writes."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with running_manager(tmp_path / "data") as running:
        monkeypatch.setenv("MODELFLEET_MANAGER", running.address)
        yield


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Folders of two versions of a model."""
    made = (graphs.affine(), graphs.two_inputs())
    return [
        str(graphs.write(graphs.tensor_bundle(graph), tmp_path / f"v{number}")) for number, graph in enumerate(made, 1)
    ]


async def aliases() -> dict[str, int]:
    shown = json.loads((await run("models", "--json")).stdout)
    found: dict[str, int] = shown["models"][0]["aliases"]
    return found


async def test_a_served_alias_is_not_moved_by_a_push_without_consent(folders: list[str]) -> None:
    assert (await run("push", folders[0], "--name", "m", "--alias", "stable")).exit_code == 0
    assert (await run("push", folders[0], "--name", "m", "--alias", "stable")).exit_code == 0  # it names that already

    refused = await run("push", folders[1], "--name", "m", "--alias", "stable")

    assert refused.exit_code == 1
    assert (
        "m@stable names m@1, which is served; m@2 would take its place at once. Nothing was changed." in refused.output
    )
    assert "modelfleet rollout start m 2 --alias stable" in refused.output
    assert await aliases() == {"stable": 1}
    assert (await run("push", folders[1], "--name", "m", "--alias", "stable", "--force")).exit_code == 0
    assert await aliases() == {"stable": 2}


@pytest.mark.parametrize(("answer", "named"), [("y\n", 2), ("n\n", 1)])
async def test_on_a_terminal_it_is_asked(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, answer: str, named: int
) -> None:
    monkeypatch.setattr(consent, "is_terminal", lambda: True)
    await run("push", folders[0], "--name", "m", "--alias", "stable")

    asked = await run("push", folders[1], "--name", "m", "--alias", "stable", answer=answer)

    assert "would take its place at once. Go on? [y/N]" in asked.output
    assert await aliases() == {"stable": named}


async def test_a_push_without_an_alias_says_how_the_version_comes_to_be_served(folders: list[str]) -> None:
    first = await run("push", folders[0], "--name", "m")
    assert "No alias names it, so it is not served yet. Serve it: modelfleet alias m@stable 1" in first.output
    moved = await run("alias", "m@stable", "1")
    assert moved.stdout.strip() == "m@stable names m@1"

    second = await run("push", folders[1], "--name", "m")
    assert (
        "m@stable names m@1 still. Move it to this version, under watch: modelfleet rollout start m 2" in second.output
    )
    again = await run("push", folders[0], "--name", "m")
    assert "It is what m@stable names already." in again.output
    assert (await run("alias", "m@stable", "2")).stdout.strip() == "m@stable names m@2, no longer m@1"


async def test_an_alias_that_is_served_is_not_deleted_without_consent(folders: list[str]) -> None:
    await run("push", folders[0], "--name", "m", "--alias", "stable")

    refused = await run("alias", "m@stable", "--delete")
    assert refused.exit_code == 1
    assert "Requests for m@stable, which names m@1, would fail. Nothing was changed. --force does it." in refused.output
    assert (await run("alias", "m@stable", "--delete", "--force")).exit_code == 0
    assert await aliases() == {}


async def test_a_model_is_not_placed_where_there_is_no_pool_without_consent(folders: list[str]) -> None:
    await run("push", folders[0], "--name", "m", "--alias", "stable")

    refused = await run("place", "m", "gpu")
    assert refused.exit_code == 1
    assert "There is no pool gpu now, so nothing would serve m. Nothing was changed. There is none." in refused.output
    assert (await run("place", "m", "gpu", "--force")).exit_code == 0


async def test_a_version_is_deleted_for_good_with_consent(folders: list[str]) -> None:
    for folder in folders:
        await run("push", folder, "--name", "m")
    await run("alias", "m@stable", "1")

    assert "m@2 would be deleted for good. Nothing was changed. --force does it." in (await run("delete", "m@2")).output
    assert (await run("delete", "m@2", "--force")).stdout.strip() == "m@2 deleted"
    named = await run("delete", "m@1", "--force")
    assert (named.exit_code, "alias" in named.output) == (1, True)
    assert (await run("delete", "m@9", "--force")).exit_code == 4
    assert (await run("delete", "m@stable", "--force")).exit_code == 2


@pytest.mark.parametrize(("flag", "shown"), [("--version", f"modelfleet {version('modelfleet')}"), ("-h", "Usage: ")])
async def test_the_usual_flags_are_there(flag: str, shown: str) -> None:
    told = await run(flag)
    assert told.exit_code == 0
    assert shown in told.stdout
