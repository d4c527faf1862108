"""Where ONNX Runtime reports to its maker unless told otherwise, it first keeps a device id in the user's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import graphs
from harness.tiny_generator import write_tiny_generator

RUN_A_GRAPH = "from modelfleet.inference.session import ort; ort.InferenceSession({path!r})"
RUN_A_GENERATOR = "from modelfleet.inference.generation.genai import og; og.Model({path!r})"
QUANTIZE_A_GRAPH = "from modelfleet_tools.export.graph import ort; ort.InferenceSession({path!r})"

# What would keep it quiet in this process, or on the machine that runs the tests.
SILENCED = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "TF_BUILD")


@pytest.mark.slow
@pytest.mark.parametrize("code", [RUN_A_GRAPH, RUN_A_GENERATOR, QUANTIZE_A_GRAPH])
def test_nothing_is_kept_or_sent_for_the_maker_of_onnx_runtime(tmp_path: Path, code: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    graph = tmp_path / "model.onnx"
    graph.write_bytes(graphs.affine().SerializeToString())
    folder = write_tiny_generator(tmp_path / "generator", [5, 6, 7])
    environment = {key: value for key, value in os.environ.items() if key not in SILENCED}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}

    path = str(folder if code is RUN_A_GENERATOR else graph)
    subprocess.run([sys.executable, "-c", code.format(path=path)], env=environment, check=True)

    assert list(home.iterdir()) == []
