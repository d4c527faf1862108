import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from harness.bundle_graphs import external_tensor, identity_graph, write_graph, write_graph_with_external
from modelfleet.bundle.graph import check_graph, table_rows
from modelfleet.runtime.errors import InvalidBundleError
from onnx import NodeProto, TensorProto, helper, numpy_helper


def test_a_graph_with_its_weights_inside_needs_no_other_file(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")

    assert check_graph(tmp_path / "model.onnx", tmp_path) == frozenset()


def test_external_data_beside_the_graph_is_told(tmp_path: Path) -> None:
    write_graph_with_external(tmp_path / "onnx/model.onnx", "model.onnx_data", offset=0, length=8)
    (tmp_path / "onnx/model.onnx_data").write_bytes(bytes(8))

    assert check_graph(tmp_path / "onnx/model.onnx", tmp_path) == {"onnx/model.onnx_data"}


def test_external_data_may_be_a_link_as_in_the_cache_of_a_model_hub(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_bytes(bytes(8))
    write_graph_with_external(tmp_path / "model/model.onnx", "weights", length=8)
    (tmp_path / "model/weights").symlink_to("../blobs/1")

    assert check_graph(tmp_path / "model/model.onnx", tmp_path / "model") == {"weights"}


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\x08", b"{}"])
def test_bytes_that_are_no_graph_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)

    with pytest.raises(InvalidBundleError, match=r"^model\.onnx is no ONNX graph"):
        check_graph(tmp_path / "model.onnx", tmp_path)


def test_a_graph_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(identity_graph().SerializeToString()[:-7])

    with pytest.raises(InvalidBundleError, match="do not parse"):
        check_graph(tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize(
    "location", ["../weights", "/etc/passwd", "a/../../weights", "", "C:\\weights", "..\\weights", "\\weights"]
)
def test_external_data_outside_of_the_bundle_is_refused_with_the_tensor_s_name(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights").write_bytes(bytes(8))
    write_graph_with_external(tmp_path / "model/model.onnx", location)

    with pytest.raises(InvalidBundleError, match=r"tensor 'weight' is at .* outside") as caught:
        check_graph(tmp_path / "model/model.onnx", tmp_path / "model")

    assert repr(location) in caught.value.message


def test_external_data_that_is_missing_is_refused(tmp_path: Path) -> None:
    write_graph_with_external(tmp_path / "model.onnx", "weights")

    with pytest.raises(InvalidBundleError, match="tensor 'weight' is at 'weights', which is missing"):
        check_graph(tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize("entries", [{"length": 9}, {"offset": 8, "length": 1}, {"offset": -8, "length": 8}])
def test_external_data_that_is_too_short_is_refused(tmp_path: Path, entries: dict[str, int]) -> None:
    write_graph_with_external(tmp_path / "model.onnx", "weights", **entries)
    (tmp_path / "weights").write_bytes(bytes(8))

    with pytest.raises(InvalidBundleError, match="but the file has 8"):
        check_graph(tmp_path / "model.onnx", tmp_path)


def test_an_offset_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_graph_with_external(tmp_path / "model.onnx", "weights", offset="far")
    (tmp_path / "weights").write_bytes(bytes(8))

    with pytest.raises(InvalidBundleError, match="no number"):
        check_graph(tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize("place", ["attribute", "subgraph", "function", "sparse"])
def test_external_data_is_found_wherever_a_graph_may_hold_tensors(tmp_path: Path, place: str) -> None:
    model, tensor = identity_graph(), external_tensor("../weights")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    if place == "attribute":
        model.graph.node.append(constant)
    elif place == "subgraph":
        inner = helper.make_graph([constant], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    elif place == "function":
        model.functions.append(helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)]))
    else:
        model.graph.sparse_initializer.add(values=tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(InvalidBundleError, match=re.escape("'../weights', outside")):
        check_graph(tmp_path / "model.onnx", tmp_path)


def saved_look_up(directory: Path, *nodes: NodeProto, tables: Mapping[str, int]) -> Path:
    """Write a graph of `ids` and `types` with those nodes, the last of which makes `y`, and tables of so many rows."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in ("ids", "types")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(np.zeros((rows, 2), np.float32), name) for name, rows in tables.items()]
    path = directory / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", inputs, [output], weights)).SerializeToString())
    return path


def test_the_rows_of_tables_are_told_for_each_input_that_chooses_among_them(tmp_path: Path) -> None:
    nodes = (
        helper.make_node("Cast", ["ids"], ["narrow_ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["words", "narrow_ids"], ["of_word"]),
        helper.make_node("Gather", ["more_words", "ids"], ["also_of_word"], axis=0),
        helper.make_node("Identity", ["kinds"], ["same_kinds"]),
        helper.make_node("Gather", ["same_kinds", "types"], ["y"]),
    )
    path = saved_look_up(tmp_path, *nodes, tables={"words": 9, "more_words": 7, "kinds": 2})

    assert table_rows(path) == {"ids": 7, "types": 2}


def test_the_rows_of_tables_are_told_where_look_ups_are_fused(tmp_path: Path) -> None:
    parts = ["ids", "types", "words", "places", "kinds", "scale", "shift"]
    node = helper.make_node("EmbedLayerNormalization", parts, ["y", "mask"], domain="com.microsoft")
    path = saved_look_up(tmp_path, node, tables={"words": 9, "places": 5, "kinds": 2})

    assert table_rows(path) == {"ids": 9, "types": 2}


def test_inputs_that_are_computed_with_or_choose_columns_are_left_out(tmp_path: Path) -> None:
    nodes = (
        helper.make_node("Abs", ["ids"], ["positive_ids"]),
        helper.make_node("Gather", ["words", "positive_ids"], ["of_word"]),
        helper.make_node("Gather", ["kinds", "types"], ["y"], axis=1),
    )
    path = saved_look_up(tmp_path, *nodes, tables={"words": 9, "kinds": 2})

    assert table_rows(path) == {}
