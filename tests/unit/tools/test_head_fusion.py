"""A base and a head as one graph, run by ONNX Runtime and held against numpy."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from modelfleet.bundle.manifest import Manifest, Pooling
from modelfleet.runtime.errors import InvalidBundleError
from modelfleet_tools.export.graph import Graph
from modelfleet_tools.train.fusion import OUTPUT, fuse
from modelfleet_tools.train.head import Head, Layer, logits
from onnx import TensorProto, helper, numpy_helper

TABLE = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
IDS = np.array([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10]])
LENGTHS = (3, 1, 4)
LAYERS = (
    Layer(np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6), np.full(5, 0.1, np.float32)),
    Layer(np.linspace(1, -2, 10, dtype=np.float32).reshape(2, 5), np.array([0.5, -0.5], np.float32)),
)


def write_base(path: Path, *, opset: int = 17, pooled: bool = False) -> None:
    """A table of token vectors; the graph has no mask."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["tokens"])]
    shape: list[str | int] = ["batch", "sequence", 6]
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["tokens"], ["vectors"], axes=[1], keepdims=0))
        shape = ["batch", 6]
    output = helper.make_tensor_value_info("vectors" if pooled else "tokens", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "base", [ids], [output], [numpy_helper.from_array(TABLE, "table")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


def manifest(pooling: Pooling, *, normalize: bool) -> Manifest:
    return Manifest.model_validate(
        {
            "task": "embed",
            "model": "model.onnx",
            "tokenizer": "tokenizer.json",
            "max_tokens": 8,
            "pooling": pooling,
            "normalize": normalize,
        }
    )


def pooled_by_hand(pooling: Pooling) -> np.ndarray:
    rows = [TABLE[ids[:length]] for ids, length in zip(IDS, LENGTHS, strict=True)]
    picks = {Pooling.MEAN: lambda row: row.mean(axis=0), Pooling.CLS: lambda row: row[0]}
    picks[Pooling.LAST] = lambda row: row[-1]
    return np.stack([picks[pooling](row) for row in rows])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST])
def test_the_graph_gives_what_the_head_gives_on_pooled_vectors(
    pooling: Pooling, normalize: bool, tmp_path: Path
) -> None:
    write_base(tmp_path / "base.onnx")
    vectors = pooled_by_hand(pooling)
    if normalize:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    fuse(tmp_path / "base.onnx", manifest(pooling, normalize=normalize), LAYERS, tmp_path / "fused.onnx")

    mask = (np.arange(4) < np.array(LENGTHS)[:, None]).astype(np.int64)
    graph = Graph(tmp_path / "fused.onnx")
    inputs = {"input_ids": IDS, "attention_mask": mask}
    found = graph.run({name: inputs[name] for name in graph.inputs})[OUTPUT]
    np.testing.assert_allclose(found, logits(Head(LAYERS, 1, 1, 0.0), vectors), rtol=1e-5, atol=1e-6)


def test_a_base_that_pools_is_not_pooled_again(tmp_path: Path) -> None:
    write_base(tmp_path / "base.onnx", pooled=True)

    fuse(tmp_path / "base.onnx", manifest(Pooling.MEAN, normalize=False), LAYERS[:1], tmp_path / "fused.onnx")
    found = Graph(tmp_path / "fused.onnx").run({"input_ids": IDS})[OUTPUT]

    wanted = TABLE[IDS].mean(axis=1) @ LAYERS[0].weight.T + LAYERS[0].bias
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_base_of_an_old_opset_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base.onnx", opset=11)

    with pytest.raises(InvalidBundleError, match=r"opset 11; a head needs 13 or later"):
        fuse(tmp_path / "base.onnx", manifest(Pooling.CLS, normalize=False), LAYERS, tmp_path / "fused.onnx")
