"""A bundle that cannot be served is refused at push where that can be known, and else FAILED with the reason."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from e2e.conftest import Serving
from modelfleet.bundle.bundle import Bundle, BundleFile, hash_file
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.client import Client
from modelfleet.runtime.errors import InvalidBundleError, StateConflictError
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.slow


def doubling_graph() -> onnx.ModelProto:
    """x: float [n, 3] -> y = 2 x."""
    two = numpy_helper.from_array(np.full(3, 2, np.float32), "two")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        "doubling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [two],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def point_outside(graph: onnx.ModelProto) -> None:
    (tensor,) = graph.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    tensor.external_data.add(key="length", value="12")


def write(folder: Path, change: Callable[[onnx.ModelProto], None] = lambda _: None) -> Path:
    folder.mkdir()
    graph = doubling_graph()
    change(graph)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    return folder


def as_tensor_bundle(folder: Path) -> tuple[Bundle, dict[str, Path]]:
    """What a client that checks nothing would push."""
    path = folder / "model.onnx"
    return Bundle((BundleFile("model.onnx", *hash_file(path)),), Manifest(task=Task.TENSOR, model="model.onnx")), {
        "model.onnx": path
    }


def still_serves(client: Client) -> bool:
    return client.embed("minilm", ["still here"]).vectors.shape == (1, 384)


def test_a_corrupt_graph_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    folder = write(tmp_path / "corrupt")
    (folder / "model.onnx").write_bytes(b"this is no protobuf" * 10)

    with pytest.raises(InvalidBundleError, match=r"model\.onnx"):
        open_directory(folder)


def test_a_corrupt_graph_that_was_pushed_anyway_fails_on_the_worker_with_the_reason(
    serving: Serving, tmp_path: Path
) -> None:
    folder = write(tmp_path / "corrupt")
    (folder / "model.onnx").write_bytes(b"this is no protobuf" * 10)
    bundle, paths = as_tensor_bundle(folder)
    serving.client.push(bundle, paths, "corrupt", alias="stable")

    with pytest.raises(StateConflictError, match=r"corrupt@1 cannot be served: .*model\.onnx"):
        serving.client.wait_until_served("corrupt", timeout_s=30)

    assert still_serves(serving.client)
    serving.client.delete_alias("corrupt", "stable")


def test_external_data_outside_of_the_bundle_is_refused_at_push_and_on_the_worker(
    serving: Serving, tmp_path: Path
) -> None:
    folder = write(tmp_path / "outside", point_outside)
    with pytest.raises(InvalidBundleError, match=r"etc/passwd"):
        open_directory(folder)
    bundle, paths = as_tensor_bundle(folder)
    serving.client.push(bundle, paths, "outside", alias="stable")

    with pytest.raises(StateConflictError, match=r"outside@1 cannot be served: .*etc/passwd"):
        serving.client.wait_until_served("outside", timeout_s=30)

    assert still_serves(serving.client)
    serving.client.delete_alias("outside", "stable")


def test_a_text_model_without_a_tokenizer_is_refused(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tmp_path / "no-tokenizer"
    folder.mkdir()
    for name in ("model.onnx", "config.json", "modelfleet.yaml"):
        (folder / name).write_bytes((minilm_folder / name).read_bytes())

    with pytest.raises(InvalidBundleError, match=r"tokenizer\.json"):
        open_directory(folder)


def test_a_failing_new_version_leaves_the_alias_on_the_old_one(serving: Serving, tmp_path: Path) -> None:
    good, paths = as_tensor_bundle(write(tmp_path / "good"))
    serving.client.push(good, paths, "kept", alias="stable")
    serving.client.wait_until_served("kept", timeout_s=30)
    bad = write(tmp_path / "bad")
    (bad / "model.onnx").write_bytes(b"broken")
    broken, paths = as_tensor_bundle(bad)
    serving.client.push(broken, paths, "kept", alias="stable")

    with pytest.raises(StateConflictError, match="kept@2 cannot be served"):
        serving.client.wait_until_served("kept@2", timeout_s=30)

    x = np.array([[1, 2, 3]], np.float32)
    outputs = serving.client.infer("kept", {"x": x})
    np.testing.assert_array_equal(outputs["y"], 2 * x)
    serving.client.delete_alias("kept", "stable")


def test_a_file_name_that_leaves_the_bundle_cannot_be_described(minilm_folder: Path) -> None:
    bundle, _ = open_directory(minilm_folder)

    with pytest.raises(InvalidBundleError, match=r"'\.\./evil' cannot be a file of a bundle"):
        dataclasses.replace(bundle, files=(*bundle.files, BundleFile("../evil", "0" * 64, 1)))
