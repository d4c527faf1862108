import json
from pathlib import Path
from typing import Any

import pytest
from harness.tiny_generator import EOS, write_tiny_generator
from modelfleet.inference.generation.genai import open_genai
from modelfleet.inference.session import Device, SessionOptions
from modelfleet.runtime.errors import InvalidBundleError, ProviderUnavailableError


def options(directory: Path, device: Device = Device.CPU) -> SessionOptions:
    return SessionOptions(device=device, device_id=0, threads=1, device_memory_bytes=0, engine_cache=directory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_generator(tmp_path / "model", [5, 6, 7])


def change(folder: Path, **decoder: Any) -> None:
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"] |= decoder
    path.write_text(json.dumps(settings))


def test_what_the_engine_can_do_is_read_from_it(folder: Path) -> None:
    model = open_genai(folder, options(folder))

    assert not model.paged
    assert model.batch_rows == 4
    assert model.eos_token_ids == {EOS}
    assert model.cache_bytes_per_token == 2 * 8 * 4  # keys and values, 8 numbers of 4 bytes each
    assert model.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"session_options": {"custom_ops_library": "evil.so"}}, "loads a library of its own"),
        ({"filename": "../model.onnx"}, "outside of the bundle"),
        ({"filename": "/etc/passwd"}, "outside of the bundle"),
        ({"filename": "absent.onnx"}, "refuses the model"),
        ({"head_size": 0}, "no positive numbers"),
        ({"num_hidden_layers": None}, "no positive numbers"),
    ],
)
def test_settings_that_reach_out_or_make_no_sense_are_refused(
    folder: Path, decoder: dict[str, Any], message: str
) -> None:
    change(folder, **decoder)

    with pytest.raises(InvalidBundleError, match=message):
        open_genai(folder, options(folder))


def test_a_folder_without_settings_is_refused(folder: Path) -> None:
    (folder / "genai_config.json").unlink()

    with pytest.raises(InvalidBundleError, match="Build the model with onnxruntime-genai"):
        open_genai(folder, options(folder))


@pytest.mark.parametrize("device", [Device.CUDA, Device.TENSORRT])
def test_a_device_that_is_not_there_is_an_error_and_never_another_one(folder: Path, device: Device) -> None:
    with pytest.raises(ProviderUnavailableError, match=device.value):
        open_genai(folder, options(folder, device))
