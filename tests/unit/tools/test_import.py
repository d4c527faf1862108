"""Imports from folders, and from a stand-in for the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from harness.bundle_graphs import identity_graph
from harness.graphs import large
from harness.hub import SHA, serving_hub
from harness.small_tokenizers import wordpiece_json
from modelfleet.bundle.directory import open_directory
from modelfleet.runtime.errors import InvalidInputError
from modelfleet_tools.__main__ import app
from modelfleet_tools.importing import chosen_graph
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.slow

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes"},
    "max_position_embeddings": 32,
    "vocab_size": 90,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": wordpiece_json(),
    "LICENSE": b"as is",
    "onnx/model.onnx": identity_graph().SerializeToString(),
    "onnx/model_int8.onnx": identity_graph().SerializeToString(),
    "model.safetensors": b"weights",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of a hub that has `org/tiny` and `org/empty`."""
    with serving_hub({"org/tiny": FILES, "org/empty": {"config.json": b"{}"}}) as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield asked


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["import", *arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_repository_with_a_graph_becomes_a_bundle(hub: list[str], revision: str, tmp_path: Path) -> None:
    done = run(f"hf://org/tiny{revision}", "--out", str(tmp_path / "bundle"), "--json")

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["revision"] == SHA
    bundle, paths = open_directory(tmp_path / "bundle")
    assert bundle.manifest.labels == ("no", "yes")
    assert bundle.manifest.model == "onnx/model.onnx"
    assert set(paths) == {"LICENSE", "config.json", "onnx/model.onnx", "tokenizer.json"}
    assert not any("safetensors" in path or "int8" in path for path in hub)


def test_another_graph_is_taken_when_named(hub: list[str], tmp_path: Path) -> None:
    done = run("hf://org/tiny", "--graph", "onnx/model_int8.onnx", "--out", str(tmp_path / "bundle"))

    assert done.exit_code == 0, done.output
    assert open_directory(tmp_path / "bundle")[0].manifest.model == "onnx/model_int8.onnx"
    assert hub


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("hf://org/absent", 4, "The hub has no model org/absent"),
        ("hf://org/tiny@v9", 4, "org/tiny has no revision 'v9'"),
        ("hf://org/empty", 1, "has neither ONNX graphs nor safetensors"),
        ("hf://too/many/parts", 1, "names no repository"),
        ("nowhere", 4, "nowhere is no folder"),
    ],
)
def test_a_source_that_is_none_is_named(hub: list[str], source: str, code: int, message: str, tmp_path: Path) -> None:
    done = run(source, "--out", str(tmp_path / "bundle"))

    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert not (tmp_path / "bundle").exists()
    assert isinstance(hub, list)


def test_a_hub_that_cannot_be_reached_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    done = run("hf://org/tiny", "--out", str(tmp_path / "bundle"))

    assert done.exit_code == 3, done.output
    assert "The hub cannot be reached or failed" in done.output


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ((403, b"{}", {"X-Error-Code": "GatedRepo"}), 1, "org/tiny is gated: accept its terms on the hub, and set HF_"),
        ((401, b"{}", {"X-Error-Message": "Invalid credentials"}), 1, "The hub refuses access to org/tiny (401)"),
        ((500, b"oops", {}), 3, "The hub cannot be reached or failed"),
        ((429, b"slower", {}), 3, "The hub cannot be reached or failed"),
    ],
)
def test_what_a_hub_refuses_is_told_apart_from_what_a_retry_helps(
    answer: tuple[int, bytes, dict[str, str]],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with serving_hub({"org/tiny": FILES}, instead=lambda _: answer) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        done = run("hf://org/tiny", "--out", str(tmp_path / "bundle"))

    assert (done.exit_code, message in done.output) == (code, True), done.output


def test_a_hub_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("modelfleet_tools.importing.TIMEOUT_S", 0.2)
    over = Event()
    with serving_hub({"org/tiny": FILES}, instead=lambda _: over.wait() and None) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        done = run("hf://org/tiny", "--out", str(tmp_path / "bundle"))
        over.set()

    assert (done.exit_code, "The hub cannot be reached or failed" in done.output) == (3, True), done.output


def test_a_download_that_is_cut_off_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = large(30 << 20).SerializeToString()  # the client keeps whole pieces of 10 MB
    three_labels = json.dumps({**CONFIG, "id2label": {"0": "a", "1": "b", "2": "c"}}).encode()
    files = {**FILES, "config.json": three_labels, "onnx/model.onnx": graph}
    with serving_hub({"org/tiny": files}, cut_off="onnx/model.onnx") as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        done = run("hf://org/tiny", "--out", str(tmp_path / "bundle"))

    assert done.exit_code == 0, done.output
    assert (tmp_path / "bundle/onnx/model.onnx").read_bytes() == graph
    (resumed,) = (path for path in asked if " from " in path)
    assert 0 < int(resumed.rpartition(" ")[2]) <= len(graph) // 2


def test_a_local_folder_becomes_a_bundle_without_the_hub(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)

    done = run(str(tmp_path / "model"), "--out", str(tmp_path / "bundle"))
    again = run(str(tmp_path / "model"), "--out", str(tmp_path / "bundle"))

    assert done.exit_code == 0, done.output
    assert open_directory(tmp_path / "bundle")[0].manifest.task == "classify"
    assert again.exit_code == 1
    assert "exists. Give another --out, or --overwrite it" in again.output


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (["a.onnx", "model.onnx", "onnx/model.onnx"], None, "model.onnx"),
        (["onnx/a.onnx"], None, "onnx/a.onnx"),
        (["model.safetensors"], None, None),
        (["model.onnx", "a.onnx"], "a.onnx", "a.onnx"),
    ],
)
def test_the_graph_is_chosen(files: list[str], wanted: str | None, chosen: str | None) -> None:
    assert chosen_graph(files, wanted, "it") == chosen


def test_an_undecided_choice_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"several graphs: a\.onnx, b\.onnx\. Choose one with --graph"):
        chosen_graph(["a.onnx", "b.onnx"], None, "it")
    with pytest.raises(InvalidInputError, match=r"no graph 'c\.onnx'\. It has a\.onnx"):
        chosen_graph(["a.onnx"], "c.onnx", "it")
