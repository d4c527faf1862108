"""A worker as a process that cannot start."""

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

pytestmark = pytest.mark.slow

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@pytest.mark.parametrize("device", PROVIDERS)
def test_a_device_that_is_not_there_ends_the_worker_at_once_with_a_sentence(device: str, tmp_path: Path) -> None:
    if PROVIDERS[device] in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime may have the device")
    command = [sys.executable, "-m", "modelfleet.inference", "--host=127.0.0.1", "--port=0", "--metrics-port=0"]

    ended = subprocess.run(
        [*command, f"--device={device}", f"--cache-dir={tmp_path}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 1
    *log, sentence = ended.stderr.splitlines()
    assert sentence.startswith(f"The worker cannot start: {PROVIDERS[device]} was asked for (--device {device})")
    assert "CPUExecutionProvider. Install modelfleet[inference-gpu], or set --device cpu." in sentence
    assert not any('"listening"' in line for line in log)
