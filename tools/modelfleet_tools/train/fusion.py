"""Base and head as one graph: pooling, the norm and the layers are added behind the base's output."""

from pathlib import Path

import numpy as np
import onnx
from modelfleet.bundle.manifest import Manifest, Pooling
from modelfleet.runtime.errors import InvalidBundleError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelfleet_tools.train.head import Layer

OUTPUT = "logits"
_PREFIX = "modelfleet_head"
_LEAST_OPSET = 13  # ReduceSum and Unsqueeze take their axes as inputs from there on
_RANK_OF_TOKENS = 3


def fuse(base: Path, manifest: Manifest, layers: tuple[Layer, ...], out: Path) -> None:
    """
    Write the graph that gives logits [batch, labels]. It takes what the base takes, and attention_mask in any case.

    Raises InvalidBundleError for a base of an opset before 13.
    """
    model = onnx.load(base)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET:
        raise InvalidBundleError(
            f"The base's graph is of opset {opset}; a head needs {_LEAST_OPSET} or later. Export it again.",
            field="model",
        )
    chosen = next(output for output in model.graph.output if manifest.output in (None, output.name))
    builder = _Builder(model)
    vectors = builder.node("Cast", [chosen.name], to=TensorProto.FLOAT)
    if len(chosen.type.tensor_type.shape.dim) == _RANK_OF_TOKENS and manifest.pooling is not Pooling.MODEL:
        vectors = _pooled(builder, vectors, manifest.pooling)
    if manifest.normalize:
        squares = builder.node("ReduceSum", [builder.node("Mul", [vectors, vectors]), builder.ints([1])], keepdims=1)
        tiny = builder.constant(np.array(np.finfo(np.float32).tiny, np.float32))
        vectors = builder.node("Div", [vectors, builder.node("Max", [builder.node("Sqrt", [squares]), tiny])])
    for index, layer in enumerate(layers):
        if index:
            vectors = builder.node("Relu", [vectors])
        weight, bias = builder.constant(layer.weight), builder.constant(layer.bias)
        last = index == len(layers) - 1
        vectors = builder.node("Gemm", [vectors, weight, bias], output=OUTPUT if last else None, transB=1)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", len(layers[-1].bias)]))
    onnx.save(model, out)


def _pooled(builder: "_Builder", output: str, pooling: Pooling) -> str:
    if pooling is Pooling.CLS:
        return builder.node("Gather", [output, builder.constant(np.array(0, np.int64))], axis=1)
    mask = builder.node("Cast", [builder.mask()], to=TensorProto.FLOAT)
    counts = builder.node("ReduceSum", [mask, builder.ints([1])], keepdims=1)
    if pooling is Pooling.LAST:
        # A weight of 1 on the token whose running count of real tokens is the whole count, if it is real itself.
        running = builder.node("CumSum", [mask, builder.constant(np.array(1, np.int64))])
        last = builder.node("Cast", [builder.node("Equal", [running, counts])], to=TensorProto.FLOAT)
        weights = builder.node("Mul", [last, mask])
    else:
        weights = builder.node("Div", [mask, counts])
    column = builder.node("Unsqueeze", [weights, builder.ints([2])])
    return builder.node("ReduceSum", [builder.node("Mul", [output, column]), builder.ints([1])], keepdims=0)


class _Builder:
    """Adds nodes with names of their own to a graph."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._count = 0

    def node(self, operator: str, inputs: list[str], *, output: str | None = None, **attributes: int) -> str:
        """Add a node and return the name of its output."""
        name = output or self._name(operator)
        made: NodeProto = helper.make_node(
            operator, inputs, [name], self._name(operator), None, None, None, **attributes
        )
        self._graph.node.append(made)
        return name

    def constant(self, array: np.ndarray) -> str:
        """Add a constant and return its name."""
        name = self._name("constant")
        self._graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def ints(self, values: list[int]) -> str:
        """Add axes and return their name."""
        return self.constant(np.array(values, np.int64))

    def mask(self) -> str:
        """Return the input that tells tokens from padding; a base without one gets it."""
        name = "attention_mask"
        if all(given.name != name for given in self._graph.input):
            self._graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]))
        return name

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{_PREFIX}_{what}_{self._count}"
