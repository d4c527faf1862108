import asyncio
from pathlib import Path

import numpy as np
import pytest
from harness import graphs
from modelfleet.bundle.manifest import Activation, Pooling, Task
from modelfleet.inference.batching import Row
from modelfleet.inference.jobs import Job
from modelfleet.inference.models import LoadedModel, TensorModel, TextModel
from modelfleet.inference.session import RunCancellation
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError
from onnx import ModelProto, TensorProto, helper


def rows_of(payload: object, *lengths: int) -> list[Row[Job]]:
    loop = asyncio.new_event_loop()
    job = Job(lengths, 0.0, 0.0, None, payload, loop.create_future(), [None] * len(lengths), len(lengths))
    loop.close()
    return [Row(job, index, length) for index, length in enumerate(lengths)]


def tokens(*texts: list[int], type_ids: list[int] | None = None) -> Tokens:
    lengths = np.array([len(text) for text in texts], np.int32)
    types = None if type_ids is None else np.array(type_ids, np.uint8)
    return Tokens.whole(np.concatenate(texts).astype(np.int32), lengths, types)


def text_model(directory: Path, graph: ModelProto, task: Task, **manifest: object) -> TextModel:
    model = graphs.load(graphs.text_bundle(graph, task, **manifest), directory)
    assert isinstance(model, TextModel)
    return model


def tensor_model(directory: Path, graph: ModelProto) -> TensorModel:
    model = graphs.load(graphs.tensor_bundle(graph), directory)
    assert isinstance(model, TensorModel)
    return model


def results(model: LoadedModel, rows: list[Row[Job]]) -> list[object]:
    return list(model.reduce(model.run(model.collate(rows), RunCancellation()), rows))


def graph_of(inputs: dict[str, int], *outputs: tuple[str, list[object]]) -> ModelProto:
    """Make a graph with these inputs [batch, tokens], by dtype; it has no sense but is whole."""
    graph = helper.make_graph(
        [
            helper.make_node("RandomNormal", [], [name], shape=[1 if isinstance(size, str) else size for size in shape])
            for name, shape in outputs
        ],
        "graph",
        [helper.make_tensor_value_info(name, dtype, ["batch", "tokens"]) for name, dtype in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


ALL_INPUTS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids"), TensorProto.INT64)
HIDDEN = ("hidden", ["batch", "tokens", 4])


def test_rows_are_padded_to_the_longest_with_what_the_graph_asks_for(tmp_path: Path) -> None:
    model = text_model(tmp_path, graph_of(ALL_INPUTS, HIDDEN), Task.EMBED, pad_token_id=7)
    inputs = model.collate(rows_of(tokens([11, 12], [13], type_ids=[0, 1, 1]), 2, 1))
    assert {name: array.tolist() for name, array in inputs.items()} == {
        "input_ids": [[11, 12], [13, 7]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [1, 0]],
        "position_ids": [[0, 1], [0, 1]],
    }


def test_inputs_have_the_dtype_of_the_graph(tmp_path: Path) -> None:
    inputs = {"input_ids": TensorProto.INT32, "attention_mask": TensorProto.FLOAT, "token_type_ids": TensorProto.INT64}
    collated = text_model(tmp_path, graph_of(inputs, HIDDEN), Task.EMBED).collate(rows_of(tokens([1, 2]), 2))
    assert {name: array.dtype.name for name, array in collated.items()} == {
        "input_ids": "int32",
        "attention_mask": "float32",
        "token_type_ids": "int64",
    }


def test_type_ids_are_zero_where_the_tokens_have_none(tmp_path: Path) -> None:
    model = text_model(tmp_path, graph_of(ALL_INPUTS, HIDDEN), Task.EMBED)
    assert model.collate(rows_of(tokens([1, 2]), 2))["token_type_ids"].tolist() == [[0, 0]]


def test_rows_of_different_requests_share_inputs(tmp_path: Path) -> None:
    model = text_model(tmp_path, graph_of(ALL_INPUTS, HIDDEN), Task.EMBED)
    one, other = rows_of(tokens([1], [2, 3]), 1, 2), rows_of(tokens([4]), 1)
    assert model.collate([one[1], other[0]])["input_ids"].tolist() == [[2, 3], [4, 0]]


def test_an_embedder_returns_one_vector_a_row(tmp_path: Path) -> None:
    model = text_model(tmp_path, graphs.embedder(), Task.EMBED)
    expected = [2 * graphs.VECTORS[text].mean(axis=0) for text in ([5, 6, 7], [8])]
    np.testing.assert_allclose(results(model, rows_of(tokens([5, 6, 7], [8]), 3, 1)), expected, atol=1e-5)


def test_a_graph_that_pools_by_itself_is_not_pooled_again_whatever_the_manifest_says(tmp_path: Path) -> None:
    model = text_model(tmp_path, graphs.pooled_embedder(), Task.EMBED, pooling=Pooling.MEAN)
    (vector,) = results(model, rows_of(tokens([5, 6]), 2))
    mean = graphs.VECTORS[[5, 6]].mean(axis=0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_classifier_returns_probabilities(tmp_path: Path) -> None:
    (softmax,) = results(text_model(tmp_path, graphs.classifier(), Task.CLASSIFY), rows_of(tokens([5, 6]), 2))
    sigmoid_model = text_model(tmp_path, graphs.classifier(), Task.CLASSIFY, activation=Activation.SIGMOID)
    (sigmoid,) = results(sigmoid_model, rows_of(tokens([5, 6]), 2))
    logits = graphs.LABEL_LOGITS[[5, 6]].mean(axis=0)
    np.testing.assert_allclose(softmax, np.exp(logits) / np.exp(logits).sum(), atol=1e-6)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_a_labeller_returns_probabilities_of_each_token_without_padding(tmp_path: Path) -> None:
    model = text_model(tmp_path, graphs.labeller(), Task.ENTITIES)
    long, short = results(model, rows_of(tokens([5, 6, 7], [8]), 3, 1))
    assert [np.shape(long), np.shape(short)] == [(3, 5), (1, 5)]
    assert long.argmax(axis=1).tolist() == graphs.ENTITY_LOGITS[[5, 6, 7]].argmax(axis=1).tolist()


def test_the_output_that_the_manifest_names_is_read(tmp_path: Path) -> None:
    graph = graph_of(ALL_INPUTS, ("pooler", ["batch", 9]), HIDDEN)
    assert text_model(tmp_path, graph, Task.EMBED).output.name == "pooler"
    assert text_model(tmp_path, graph, Task.EMBED, output="hidden").output.name == "hidden"


@pytest.mark.parametrize(
    ("graph", "task", "manifest", "message"),
    [
        (
            graph_of({"pixels": TensorProto.FLOAT}, HIDDEN),
            Task.EMBED,
            {},
            r"inputs are pixels; .* has input_ids",
        ),
        (graph_of({**ALL_INPUTS, "bbox": TensorProto.INT64}, HIDDEN), Task.EMBED, {}, r"inputs are .*bbox"),
        (graph_of(ALL_INPUTS, HIDDEN), Task.EMBED, {"output": "x"}, r"output is 'x'; the graph has hidden"),
        (graph_of(ALL_INPUTS, ("y", [1])), Task.EMBED, {}, r"'y' .* has 1 dimensions, .*'embed' cannot read"),
        (graph_of(ALL_INPUTS, HIDDEN), Task.EMBED, {"pooling": "model"}, r"'hidden' .* a vector for each token"),
        (graph_of(ALL_INPUTS, HIDDEN), Task.CLASSIFY, {}, r"'hidden' .* has 3 dimensions, .*'classify' cannot read"),
        (
            graph_of(ALL_INPUTS, ("y", ["batch", 2])),
            Task.CLASSIFY,
            {},
            r"'y' of the graph scores 2 labels, and the manifest has 3",
        ),
        (
            graph_of(ALL_INPUTS, HIDDEN),
            Task.ENTITIES,
            {},
            r"'hidden' of the graph scores 4 labels, and the manifest has 5",
        ),
        (graph_of(ALL_INPUTS, HIDDEN), Task.RERANK, {}, r"'hidden' .* has 3 dimensions, .*'rerank' cannot read"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest_is_refused(
    tmp_path: Path, graph: ModelProto, task: Task, manifest: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidBundleError, match=message):
        text_model(tmp_path, graph, task, **manifest)


def test_tensors_are_rows_where_every_first_dimension_may_vary(tmp_path: Path) -> None:
    assert tensor_model(tmp_path, graphs.affine()).batches
    assert tensor_model(tmp_path, graphs.image()).batches
    assert not tensor_model(tmp_path, graphs.fixed_batch()).batches


def test_a_graph_without_inputs_is_one_row(tmp_path: Path) -> None:
    graph = graph_of({}, ("y", ["any"]))
    assert not tensor_model(tmp_path, graph).batches


def test_tensors_of_different_requests_share_a_run(tmp_path: Path) -> None:
    model = tensor_model(tmp_path, graphs.two_inputs())
    one = rows_of({"a": np.array([[1, 2], [3, 4]], np.float32), "b": np.array([[10, 10], [20, 20]])}, 1, 1)
    other = rows_of({"a": np.array([[5, 6]], np.float32), "b": np.array([[30, 30]])}, 1)
    sums = [result[0].tolist() for result in results(model, [one[1], other[0]])]
    assert sums == [[[23, 24]], [[35, 36]]]


def test_a_graph_whose_batch_is_no_batch_says_so(tmp_path: Path) -> None:
    distinct = helper.make_graph(
        [helper.make_node("Unique", ["x"], ["y"], axis=0)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    graph = helper.make_model(distinct, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model = tensor_model(tmp_path, graph)
    with pytest.raises(InvalidBundleError, match="got 2 rows and returned 1 as 'y'"):
        results(model, rows_of({"x": np.zeros((2, 3), np.float32)}, 1, 1))
