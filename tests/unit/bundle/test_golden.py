"""Golden examples on disk, and when outputs count as the recorded ones."""

import math
from pathlib import Path

import numpy as np
import pytest
from harness.bundle_graphs import write_graph
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import (
    GoldenExample,
    check_outputs,
    difference,
    read_golden,
    write_golden,
)
from modelfleet.bundle.graph import Precision, precision
from modelfleet.runtime.errors import GoldenMismatchError, InvalidBundleError
from onnx import ModelProto, TensorProto, helper, numpy_helper

EXAMPLE = GoldenExample("Ada 😀", {"x": np.ones((1, 2), np.float32)}, {"y": np.array([[1, -4]], np.float32)})
OFF_BY_A_QUARTER = {"y": np.array([[1, -3]], np.float32)}


def test_what_was_written_is_read_with_names_dtypes_and_strings(tmp_path: Path) -> None:
    strings = GoldenExample("words", {"a/b": np.array([["é", ""]], object)}, {"n": np.zeros((1,), np.int8)})

    write_golden(tmp_path / GOLDEN_FILE, [EXAMPLE, strings])

    first, second = read_golden(tmp_path / GOLDEN_FILE)
    assert (first.name, second.name) == ("Ada 😀", "words")
    np.testing.assert_array_equal(first.outputs["y"], EXAMPLE.outputs["y"])
    assert second.inputs["a/b"].tolist() == [["é", ""]]
    assert second.outputs["n"].dtype == np.int8


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut short"])
def test_a_file_that_holds_no_examples_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / GOLDEN_FILE).write_bytes(content)

    with pytest.raises(InvalidBundleError, match=r"golden\.npz holds no golden examples"):
        read_golden(tmp_path / GOLDEN_FILE)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / GOLDEN_FILE, names=np.array([{"a": 1}], object))

    with pytest.raises(InvalidBundleError, match="Object arrays cannot be loaded"):
        read_golden(tmp_path / GOLDEN_FILE)


def test_an_example_without_outputs_is_refused(tmp_path: Path) -> None:
    write_golden(tmp_path / GOLDEN_FILE, [GoldenExample("half", EXAMPLE.inputs, {})])

    with pytest.raises(InvalidBundleError, match="'half' lacks inputs or outputs"):
        read_golden(tmp_path / GOLDEN_FILE)


def test_golden_examples_are_part_of_the_bundle_and_checked_when_it_is_opened(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    write_golden(tmp_path / GOLDEN_FILE, [EXAMPLE])
    bundle, paths = open_directory(tmp_path)
    assert set(paths) == {"model.onnx", GOLDEN_FILE}
    assert bundle.golden == GOLDEN_FILE

    (tmp_path / GOLDEN_FILE).write_bytes(b"broken")

    with pytest.raises(InvalidBundleError, match=r"golden\.npz"):
        open_directory(tmp_path)


def test_a_difference_is_a_share_of_the_largest_recorded_magnitude() -> None:
    assert difference(np.array([1.0, -4.0]), np.array([1.0, -3.0])) == 0.25
    assert difference(np.zeros(2), np.array([0.0, 0.5])) == 0.5


@given(arrays(np.float32, array_shapes(min_side=0), elements=st.floats(width=32)))
def test_an_output_does_not_differ_from_itself(array: np.ndarray) -> None:
    assert difference(array, array.copy()) == 0


@pytest.mark.parametrize(
    ("recorded", "got"),
    [
        (np.zeros(2), np.zeros((2, 1))),
        (np.ones(2), np.array([1.0, np.nan])),
        (np.array([np.inf, 1]), np.array([-np.inf, 1])),
        (np.array(["a"], object), np.array(["b"], object)),
    ],
)
def test_other_shapes_infinities_and_strings_are_infinitely_apart(recorded: np.ndarray, got: np.ndarray) -> None:
    assert difference(recorded, got) == math.inf


def test_strings_are_equal_whether_they_came_as_text_or_bytes() -> None:
    assert difference(np.array(["é"], object), np.array(["é".encode()], object)) == 0


def test_a_mismatch_names_the_example_the_output_the_difference_and_the_provider() -> None:
    with pytest.raises(GoldenMismatchError) as caught:
        check_outputs(
            EXAMPLE,
            {"y": np.array([[1, -3]], np.float32)},
            tolerance=0.02,
            provider="CUDAExecutionProvider",
            model="m@2",
        )

    assert caught.value.message.startswith(
        "m@2 on CUDAExecutionProvider differs from the golden example 'Ada 😀': output 'y' by 0.25 of its largest "
        "magnitude, and 0.02 is tolerated."
    )


def test_an_output_that_is_missing_is_a_mismatch() -> None:
    with pytest.raises(GoldenMismatchError, match="output 'y' by inf"):
        check_outputs(EXAMPLE, {}, tolerance=1, provider="CPUExecutionProvider", model="m@2")


def test_the_largest_tolerated_difference_is_returned() -> None:
    assert (
        check_outputs(EXAMPLE, {"y": np.array([[1, -3]], np.float32)}, tolerance=0.25, provider="p", model="m") == 0.25
    )


@pytest.mark.parametrize(
    ("operator", "weight", "expected"),
    [
        ("Add", np.float32, Precision.FP32),
        ("Add", np.float16, Precision.FP16),
        ("MatMulInteger", np.int8, Precision.INT8),
        ("QLinearMatMul", np.int8, Precision.INT8),
        ("MatMulNBits", np.uint8, Precision.INT8),
    ],
)
def test_a_graph_s_precision_is_read_from_its_operators_and_weights(
    tmp_path: Path, operator: str, weight: type, expected: Precision
) -> None:
    tensors = [numpy_helper.from_array(np.zeros(2, weight), "w")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"])], "g", ends[:1], ends[1:], tensors)
    model: ModelProto = helper.make_model(graph)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())

    assert precision(tmp_path / "model.onnx") is expected
