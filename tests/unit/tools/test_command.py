"""The command line in this process, against small real services."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from harness.bundle_graphs import write_graph
from harness.letters import Letters, served, serving_letters
from harness.manager import running_manager
from modelfleet.runtime.errors import DrainingError, InternalError, ModelNotFoundError, WrongTaskError
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result

COMMANDS = [
    *("up", "demo", "samples", "push", "models", "alias", "place", "embed", "classify", "entities", "rerank"),
    *("batch", "evaluate", "bench", "export", "verify", "import", "train"),
]


async def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run the command in a thread, as its client blocks while the services live in this one."""
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, input=stdin, env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep what the services of this process log out of what the command writes."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def letters() -> Letters:
    return Letters(served=[served("letters", 1, aliases=["stable"], providers=["CPUExecutionProvider"])])


@pytest.fixture
async def inference(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with serving_letters(letters) as targets:
        monkeypatch.setenv("MODELFLEET_INFERENCE", targets["inference"])
        yield


@pytest.fixture
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with running_manager(tmp_path / "data") as running:
        monkeypatch.setenv("MODELFLEET_MANAGER", running.address)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_graph(tmp_path / "model" / "model.onnx")
    return str(tmp_path / "model")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["samples", "fetch"]])
async def test_help_explains_each_command(command: list[str]) -> None:
    shown = await run(*command, "--help")

    assert shown.exit_code == 0
    assert "Usage: modelfleet" in shown.stdout.replace("root", "modelfleet")
    assert ("Exit codes: 0 done" if not command else "xample" if command != ["samples"] else "list") in shown.stdout


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (["embed", "letters", "a", "four"], lambda answer: answer["vectors"] == [[1, 1], [4, 1]]),
        (["classify", "letters", "a"], lambda answer: answer["results"][0]["labels"] == [{"label": "a", "score": 1}]),
        (["entities", "letters", "abc"], lambda answer: answer["results"][0]["entities"][0]["end"] == 1),
        (["rerank", "letters", "a", "bbb", "-q", "q"], lambda answer: answer["documents"][0]["index"] == 1),
    ],
)
async def test_json_is_one_document_with_the_version_that_answered(
    arguments: list[str], read: Callable[[Any], bool]
) -> None:
    shown = await run(*arguments, "--json")

    answer = json.loads(shown.stdout)
    assert shown.exit_code == 0
    assert (answer["model"], answer["model_version"]) == ("letters", 1)
    assert read(answer)
    assert shown.stderr == ""


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "letters", "four [b]"], ["letters@1: 2 dimensions", "four [b]", "+8.0000", "8.0623"]),
        (["classify", "letters", "four"], ["letters@1", "four", "1.0000"]),
        (["entities", "letters", "four"], ["FIRST", "0.5000", "0-1"]),
        (["rerank", "letters", "four", "-q", "q"], ["0.9820", "four"]),
        (["models", "--served"], ["letters@1", "READY", "stable", "CPUExecutionProvider"]),
    ],
)
async def test_a_table_shows_what_people_look_for(arguments: list[str], words: list[str]) -> None:
    shown = await run(*arguments)

    assert shown.exit_code == 0
    for word in words:
        assert word in shown.stdout


@pytest.mark.usefixtures("inference")
async def test_texts_are_the_lines_of_a_file_or_of_standard_input(tmp_path: Path, letters: Letters) -> None:
    (tmp_path / "texts").write_bytes("one\r\nzwei 😀\n\u2028 is no end of a line\n".encode())

    await run("embed", "letters", "--input", str(tmp_path / "texts"))
    await run("embed", "letters", stdin="from a pipe\nin two lines")
    await run("embed", "letters", "--input", "-", stdin="from a pipe\n")

    assert [list(request.texts) for request in letters.requests] == [
        ["one", "zwei 😀", "\u2028 is no end of a line"],
        ["from a pipe", "in two lines"],
        ["from a pipe"],
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["embed"], None, "MODEL"),
        (["embed", "m"], "", "standard input holds no text"),
        (["embed", "m"], b"\xff\xfe", "not UTF-8 at byte 0"),
        (["embed", "m", "--input", "/absent"], None, "/absent cannot be read: No such file"),
        (["embed", "m", "a", "--input", "-"], None, "not both"),
        (["embed", "m", "a", "--dimensions", "-1"], None, "--dimensions"),
        (["rerank", "m", "a"], None, "--query"),
        (["alias", "m", "1"], None, "names no alias"),
        (["alias", "m@3", "1"], None, "names no alias"),
        (["alias", "m@stable"], None, "NUMBER"),
        (["alias", "m@stable", "1", "--delete"], None, "NUMBER"),
        (["push", "/absent", "--name", "m"], None, "does not exist"),
        (["place", "m"], None, "--everywhere"),
        (["place", "m", "gpu", "--everywhere"], None, "--everywhere"),
        (["push", ".", "--name", "m", "--wait"], None, "--wait needs --alias"),
        (["frobnicate"], None, "frobnicate"),
    ],
)
async def test_wrong_usage_ends_with_2_and_says_what_is_wrong(
    arguments: list[str], stdin: str | bytes | None, message: str
) -> None:
    shown = await run(*arguments, stdin=stdin)

    assert shown.exit_code == 2
    assert message in shown.stderr
    assert shown.stdout == ""


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WrongTaskError("letters@1 is a model of the task 'classify'."), 1),
        (InternalError("Internal error. The server's log has it under request id 7."), 1),
        (DrainingError("The server is shutting down."), 3),
        (ModelNotFoundError("No model 'letters' is registered."), 4),
    ],
)
async def test_a_failed_request_is_one_sentence_and_an_exit_code(letters: Letters, error: Exception, code: int) -> None:
    letters.fail = lambda _: error

    shown = await run("embed", "letters", "a", "--json")

    assert shown.exit_code == code
    assert shown.stderr.splitlines() == [f"Error: {error}"]
    assert shown.stdout == ""


async def test_services_that_are_not_there_end_with_3_and_the_way_out() -> None:
    shown = await run("models", "--manager", "127.0.0.1:1")

    assert shown.exit_code == 3
    assert "manager service at 127.0.0.1:1 cannot be reached" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.usefixtures("manager")
async def test_a_model_is_pushed_listed_and_named(folder: str) -> None:
    pushed = await run("push", folder, "--name", "m", "--alias", "stable", "--json")
    again = await run("push", folder, "--name", "m")
    await run("alias", "m@canary", "1")
    listed = await run("models", "--json")
    versions = await run("models", "m", "--json")
    table = await run("models")
    deleted = await run("alias", "m@canary", "--delete", "--force")

    report = json.loads(pushed.stdout)
    assert (report["model"], report["model_version"], report["alias"], report["created"]) == ("m", 1, "stable", True)
    assert report["sent_bytes"] > 0
    assert again.stdout == "m@1 registered before, as the same files\n"
    assert "It is what m@stable names already." in again.stderr
    (model,) = json.loads(listed.stdout)["models"]
    assert (model["model"], model["aliases"], model["task"]) == ("m", {"canary": 1, "stable": 1}, "tensor")
    (version,) = json.loads(versions.stdout)["model_versions"]
    assert (version["bundle_digest"], version["files"][0]["path"]) == (report["bundle_digest"], "model.onnx")
    assert "canary → 1, stable → 1" in table.stdout
    assert deleted.stdout == "m@canary deleted\n"


@pytest.mark.usefixtures("manager")
@pytest.mark.parametrize(("name", "message"), [("No Good", "cannot name a model"), ("m", "holds no model")])
async def test_what_cannot_be_pushed_is_refused_with_the_reason(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()

    shown = await run("push", str(tmp_path / "empty"), "--name", name)

    assert shown.exit_code == 1
    assert message in shown.stderr


@pytest.mark.usefixtures("manager")
async def test_an_unknown_version_ends_with_4(folder: str) -> None:
    await run("push", folder, "--name", "m")

    assert (await run("alias", "m@stable", "9")).exit_code == 4
    assert (await run("models", "absent")).exit_code == 4
    assert (await run("samples", "fetch", "absent")).exit_code == 4


async def test_samples_are_listed_with_their_licences() -> None:
    samples = json.loads((await run("samples", "list", "--json")).stdout)["samples"]

    licences = {"pii": "CC-BY-4.0", "minilm": "Apache-2.0", "smollm2": "Apache-2.0"}
    assert {one["name"]: one["license"] for one in samples} == licences


@pytest.mark.usefixtures("manager")
async def test_a_model_is_placed_at_its_push_and_again_later_and_pools_that_are_not_there_are_told_of(
    folder: str,
) -> None:
    pushed = await run("push", folder, "--name", "m", "--alias", "stable", "--pool", "gpu")
    assert (pushed.exit_code, "There is no pool gpu now; there is none." in pushed.stderr) == (0, True)
    listed = json.loads((await run("models", "--json")).stdout)
    assert listed["models"][0]["pools"] == ["gpu"]

    placed = await run("place", "m", "large", "cpu", "--force")
    assert placed.stdout == "m is served by the pools cpu, large\n"
    assert "There is no pool cpu, large now" in placed.stderr

    everywhere = await run("place", "m", "--everywhere")
    assert (everywhere.stdout, everywhere.stderr) == ("m is served by every pool\n", "")
