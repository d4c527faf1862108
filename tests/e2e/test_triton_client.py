"""Triton's client, unchanged, from its own package and in a process of its own, drives the Open Inference Protocol."""

import json
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Serving
from e2e.test_bad_bundles import as_tensor_bundle, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Its protobuf is older than ours, so that it cannot live in our environment.
_PACKAGE = "tritonclient[grpc]==2.73.0"
_ENVIRONMENT = Path(__file__).parents[2] / ".cache" / "tritonclient"


@pytest.fixture(scope="module")
def triton_python() -> Path:
    python = _ENVIRONMENT / "bin" / "python"
    installed = _ENVIRONMENT / _PACKAGE
    if not installed.exists():
        venv.create(_ENVIRONMENT, with_pip=True, clear=True)
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", _PACKAGE)
        subprocess.run(install, check=True)
        installed.touch()
    return python


@pytest.fixture(scope="module")
def said(serving: Serving, triton_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client printed."""
    bundle, paths = as_tensor_bundle(write(tmp_path_factory.mktemp("doubling") / "model"))
    serving.client.push(bundle, paths, "doubling", alias="stable")
    serving.client.wait_until_served("doubling", timeout_s=30)
    script = Path(__file__).with_name("triton_client.py")
    done = subprocess.run(
        (triton_python, script, serving.cluster.addresses.inference), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_server_and_models_are_live_and_ready(said: dict[str, Any]) -> None:
    assert (said["live"], said["ready"], said["model_ready"], said["unknown_ready"]) == (True, True, True, False)
    assert said["server"] == "modelfleet"


def test_a_tensor_model_is_described_as_its_graph_is(said: dict[str, Any]) -> None:
    assert said["doubling.metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}]
    assert said["doubling.metadata"]["outputs"] == [{"name": "y", "datatype": "FP32", "shape": ["-1", "3"]}]
    config = said["doubling.config"]
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}]
    assert config["max_batch_size"] > 0


def test_a_text_model_takes_bytes(said: dict[str, Any]) -> None:
    assert said["pii.metadata"]["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}]
    assert said["minilm.metadata"]["outputs"] == [{"name": "embeddings", "datatype": "FP32", "shape": ["-1", "384"]}]
    assert said["embeddings"] == [2, 384]
    assert [[one["text"] for one in found] for found in said["entities"]] == [["Ada", "Lovelace"], []]


def test_tensors_are_inferred_and_the_request_id_comes_back(said: dict[str, Any]) -> None:
    assert said["doubled"] == [[0, 2, 4], [6, 8, 10]]
    assert said["id"] == "seven"


def test_a_wrong_dtype_is_refused_by_name(said: dict[str, Any]) -> None:
    status, message = said["wrong_dtype"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message == "The input 'x' has the dtype int32. It is float32 [any, 3]."


def test_statistics_count_what_was_run(said: dict[str, Any]) -> None:
    (stats,) = said["statistics"]
    assert stats["name"] == "doubling"
    assert stats["inference_count"] == "2"
    assert stats["inference_stats"]["success"]["count"] == "1"
    assert stats["batch_stats"][0]["batch_size"] == "2"
