import hashlib
import os
from pathlib import Path

import pytest
from harness.bundle_graphs import write_graph, write_graph_with_external
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import InvalidBundleError


def write(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def shipped(root: Path) -> set[str]:
    bundle, paths = open_directory(root)
    assert {file.path for file in bundle.files} == set(paths)
    return set(paths)


def test_a_bundle_has_the_hashes_and_the_places_of_its_files(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    write(tmp_path, "LICENSE")

    bundle, paths = open_directory(tmp_path)

    assert [(file.path, file.sha256, file.size) for file in bundle.files] == [
        (name, hashlib.sha256(content).hexdigest(), len(content))
        for name in ("LICENSE", "model.onnx")
        for content in [(tmp_path / name).read_bytes()]
    ]
    assert paths["LICENSE"] == tmp_path / "LICENSE"


def test_the_digest_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_graph(tmp_path / name / "model.onnx")
        write(tmp_path / name, "config.txt", "LICENSE")

    assert open_directory(tmp_path / "a")[0].digest == open_directory(tmp_path / "b")[0].digest


def test_only_files_worth_shipping_are_taken(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    kept = ["LICENSE", "NOTICE", "README.md", "1_Pooling/config.txt", "vocab.txt"]
    left = [
        ".gitattributes",
        ".git/HEAD",
        "__pycache__/x.pyc",
        "model.safetensors",
        "pytorch_model.bin",
        "model.pt",
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
        "openvino/model.xml",
    ]
    write(tmp_path, *kept, *left)
    (tmp_path / "modelfleet.yaml").write_text("license: MIT\n")

    assert shipped(tmp_path) == {"model.onnx", *kept}


def test_external_data_is_taken_whatever_its_name(tmp_path: Path) -> None:
    write_graph_with_external(tmp_path / "model.onnx", "weights.bin", length=8)
    (tmp_path / "weights.bin").write_bytes(bytes(8))

    assert shipped(tmp_path) == {"model.onnx", "weights.bin"}


def test_links_are_followed_as_in_the_cache_of_a_model_hub(tmp_path: Path) -> None:
    write_graph(tmp_path / "blobs/1")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.onnx").symlink_to("../blobs/1")

    bundle, _ = open_directory(tmp_path / "snapshot")

    assert bundle.files[0].size == (tmp_path / "blobs/1").stat().st_size


def test_the_manifest_overrules_what_is_inferred_and_leaves_the_rest(tmp_path: Path) -> None:
    write_graph(tmp_path / "onnx/model_q4.onnx")
    write_graph(tmp_path / "onnx/model_int8.onnx")
    (tmp_path / "modelfleet.yaml").write_text("model: onnx/model_q4.onnx\nlicense: Apache-2.0\n")

    manifest = open_directory(tmp_path)[0].manifest

    assert (manifest.task, manifest.model, manifest.license) == (Task.TENSOR, "onnx/model_q4.onnx", "Apache-2.0")
    assert shipped(tmp_path) == {"onnx/model_q4.onnx"}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("model: other.onnx", r"'other\.onnx', which is no file"),
        ("model: ../model.onnx", r"'\.\./model\.onnx' cannot be a file of a bundle"),
        ("task: translate", "task"),
        ("tokenzier: tokenizer.json", "tokenzier"),
        ("- model.onnx", "no fields"),
        ("model: [", "cannot be read"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(tmp_path: Path, manifest: str, message: str) -> None:
    write_graph(tmp_path / "model.onnx")
    (tmp_path / "modelfleet.yaml").write_text(manifest)

    with pytest.raises(InvalidBundleError, match=message):
        open_directory(tmp_path)


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    (tmp_path / "vocab.txt").symlink_to("gone")

    with pytest.raises(InvalidBundleError, match=r"vocab\.txt is no file, or a link to none"):
        open_directory(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    os.mkfifo(tmp_path / "vocab.txt")

    with pytest.raises(InvalidBundleError, match=r"vocab\.txt is no file"):
        open_directory(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="is no directory"):
        open_directory(tmp_path / "absent")
