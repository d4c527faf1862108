"""`modelfleet golden record` on a real model, and what becomes of a bundle that no longer gives what was recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from e2e.conftest import Serving
from harness.tiny_generator import spoken, write_tiny_generator
from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import read_golden, write_golden
from modelfleet.runtime.errors import StateConflictError
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, pii_folder: Path) -> Path:
    """A folder with the PII model and two golden examples."""
    folder = tmp_path_factory.mktemp("golden") / "pii"
    shutil.copytree(pii_folder, folder)
    texts = ("My name is Ada Lovelace.", "你好 😀")
    result = CliRunner().invoke(
        app, ["golden", "record", str(folder), *(f"--text={text}" for text in texts), "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [example["name"] for example in report["examples"]] == list(texts)
    return folder


def test_recorded_examples_hold_the_graph_s_inputs_and_outputs(recorded: Path) -> None:
    first, _ = read_golden(recorded / GOLDEN_FILE)

    tokens = first.inputs["input_ids"].shape[1]
    assert set(first.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert first.outputs["logits"].shape == (1, tokens, 35)


def test_workers_serve_what_gives_the_recorded_outputs_and_refuse_what_does_not(
    serving: Serving, recorded: Path
) -> None:
    serving.client.push(*open_directory(recorded), "held", alias="stable")
    serving.client.wait_until_served("held", model_version=1, timeout_s=60)
    first, second = read_golden(recorded / GOLDEN_FILE)
    first.outputs["logits"][0, 3] = np.flip(first.outputs["logits"][0, 3])  # as if of another graph
    write_golden(recorded / GOLDEN_FILE, [first, second])

    serving.client.push(*open_directory(recorded), "held", alias="stable")

    with pytest.raises(StateConflictError, match=r"held@2 on CPUExecutionProvider differs from .*'My name is Ada"):
        serving.client.wait_until_served("held@2", timeout_s=60)
    assert serving.client.extract_entities("held", ["My name is Ada Lovelace."]).model_version == 1
    serving.client.delete_alias("held", "stable")


def test_a_model_that_generates_is_held_to_the_tokens_that_it_was_certain_of(serving: Serving, tmp_path: Path) -> None:
    folder = write_tiny_generator(tmp_path / "speaker", [40, 50, 60, 70, 80])
    command = ["golden", "record", str(folder), "--text=Hi", "--json"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    (example,) = read_golden(folder / GOLDEN_FILE)
    assert example.outputs["token_ids"].tolist() == [spoken([40, 50, 60, 70, 80], example.inputs["input_ids"][0], 24)]

    serving.client.push(*open_directory(folder), "speaker", alias="stable")
    serving.client.wait_until_served("speaker", model_version=1, timeout_s=60)
    write_tiny_generator(folder, [40, 50, 60, 70, 81])  # another graph, with the examples of the first
    serving.client.push(*open_directory(folder), "speaker", alias="stable")

    with pytest.raises(StateConflictError, match=r"differs from the golden example 'Hi': token \d is 81 and not 80"):
        serving.client.wait_until_served("speaker@2", timeout_s=60)
    serving.client.delete_alias("speaker", "stable")
