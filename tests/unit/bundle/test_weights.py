import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from harness import graphs
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.weights import without_weights
from onnx import ModelProto, helper, numpy_helper

GRAPHS = [graphs.embedder(), graphs.cross_encoder(), graphs.slow(), graphs.two_inputs(), graphs.large(4000)]


def emptied(graph: ModelProto) -> ModelProto:
    """The same graph, its weights cleared by protobuf's own means."""
    copy = ModelProto()
    copy.CopyFrom(graph)
    for tensor in copy.graph.initializer:
        tensor.ClearField("raw_data")
    return copy


@pytest.mark.parametrize("graph", GRAPHS)
def test_everything_but_the_weights_is_left(graph: ModelProto) -> None:
    left = ModelProto.FromString(without_weights(memoryview(graph.SerializeToString())))

    assert left == emptied(graph)


def test_weights_that_are_no_raw_bytes_are_left() -> None:
    graph = graphs.affine()
    graph.graph.initializer.append(helper.make_tensor("floats", onnx.TensorProto.FLOAT, [3], [1, 2, 3]))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([b"a", b"b"], object), "strings"))

    left = ModelProto.FromString(without_weights(memoryview(graph.SerializeToString())))

    assert left == emptied(graph)
    assert list(left.graph.initializer[-2].float_data) == [1, 2, 3]


def test_of_a_large_graph_little_is_left() -> None:
    assert len(without_weights(memoryview(graphs.large(3_000_000).SerializeToString()))) < 1000


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_refused_or_stay_what_they_are(content: bytes) -> None:
    try:
        left = without_weights(memoryview(content))
    except ValueError:
        with pytest.raises(DecodeError):
            ModelProto.FromString(content)
        return
    try:
        whole = ModelProto.FromString(content)
    except DecodeError:
        return
    assert ModelProto.FromString(left) == emptied(whole)


@given(st.sampled_from(GRAPHS), st.data())
def test_a_graph_that_is_cut_short_is_refused_or_stays_what_it_is(graph: ModelProto, data: st.DataObject) -> None:
    content = graph.SerializeToString()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    try:
        whole = ModelProto.FromString(cut)
    except DecodeError:
        with pytest.raises((ValueError, DecodeError)):
            ModelProto.FromString(without_weights(memoryview(cut)))
    else:
        assert ModelProto.FromString(without_weights(memoryview(cut))) == emptied(whole)
