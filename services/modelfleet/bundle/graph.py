"""Checks of an ONNX graph before anything runs it: that it parses, and that its data lies inside the bundle."""

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from modelfleet.bundle.weights import without_weights
from modelfleet.runtime.errors import InvalidBundleError


class Precision(StrEnum):
    """The narrowest numbers that a graph computes with."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    """Or narrower."""


# Of the standard and of ONNX Runtime's own domain; all others with integer weights begin with QLinear.
_QUANTIZED = frozenset(
    {
        *("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention", "QGemm"),
        *("MatMulNBits", "GatherBlockQuantized"),
    }
)
# What comes out has the values, or stands for the rows, that went in.
_SAME_VALUES = frozenset({"Cast", "Identity", "DequantizeLinear"})
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


def precision(model_path: Path) -> Precision:
    """Return the precision of a graph that `check_graph` has passed, as its operators and weights tell."""
    graph = _parsed(model_path, model_path.name).graph
    if any(node.op_type in _QUANTIZED or node.op_type.startswith("QLinear") for node in graph.node):
        return Precision.INT8
    if any(tensor.data_type in _HALVES for tensor in graph.initializer):
        return Precision.FP16
    return Precision.FP32


def input_types(model_path: Path) -> Mapping[str, np.dtype[Any]]:
    """Return the dtype of each input, by name, of a graph that `check_graph` has passed; strings are objects."""
    graph = _parsed(model_path, model_path.name).graph
    constants = {tensor.name for tensor in graph.initializer}  # before IR version 4 these are inputs too
    return {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in graph.input
        if value.name not in constants
    }


def output_names(model_path: Path) -> tuple[str, ...]:
    """Return the names of the outputs, in order, of a graph that `check_graph` has passed."""
    return tuple(value.name for value in _parsed(model_path, model_path.name).graph.output)


def outputs(model_path: Path) -> Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...] | None]]:
    """
    Return dtype and shape of each output, by name, of a graph that `check_graph` has passed.

    A size that may vary is None, and so is a shape of which nothing is said.
    """
    return {
        value.name: (
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
            tuple(size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim)
            if value.type.tensor_type.HasField("shape")
            else None,
        )
        for value in _parsed(model_path, model_path.name).graph.output
        if value.type.tensor_type.elem_type
    }


def table_rows(model_path: Path) -> Mapping[str, int]:
    """
    Return how many rows an input may choose from, by name of the input, for those whose values look up constants.

    Those that are computed with first are left out. The graph is one that `check_graph` has passed.
    """
    graph = _parsed(model_path, model_path.name).graph
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    inputs = {value.name: value.name for value in graph.input}
    found: dict[str, int] = {}
    for node in graph.node:  # each stands behind those that it reads
        if node.op_type in _SAME_VALUES:
            (source, *_), (result, *_) = node.input, node.output
            if source in rows:
                rows[result] = rows[source]
            elif source in inputs:
                inputs[result] = inputs[source]
        for table, chosen in _looked_up(node):
            if table in rows and chosen in inputs:
                name = inputs[chosen]
                found[name] = min(found.get(name, rows[table]), rows[table])
    return found


def check_graph(model_path: Path, root: Path) -> frozenset[str]:
    """
    Check the graph at `model_path` in the bundle at `root`, without reading its weights.

    Returns the files of external data that it names, relative to `root`, with `/`. Raises InvalidBundleError, naming
    the file and the tensor, when the graph does not parse or its external data is missing, too short or outside the
    folder of the graph. Symbolic links are followed: what a name says is judged, not where its bytes are kept.
    """
    shown = model_path.relative_to(root).as_posix()
    return frozenset(
        _external_file(tensor, model_path, root, shown)
        for tensor in _tensors(_parsed(model_path, shown))
        if tensor.data_location == TensorProto.EXTERNAL
    )


def _parsed(model_path: Path, shown: str) -> ModelProto:
    """Return the graph without the bytes of its weights."""
    model = ModelProto()
    try:
        with model_path.open("rb") as file:
            # Not closed by hand: slices of it live for as long as the traceback of an error does.
            content = mmap(file.fileno(), 0, access=ACCESS_READ)
        model.ParseFromString(without_weights(memoryview(content)))
    except OSError as error:
        raise InvalidBundleError(f"{shown} cannot be read: {error.strerror}.", field="model") from error
    except Exception as error:  # protobuf's backends differ in what they raise; mmap raises for an empty file
        raise InvalidBundleError(
            f"{shown} is no ONNX graph: its bytes do not parse. Is the file cut short, or a Git LFS pointer? "
            "Fetch or export it again.",
            field="model",
        ) from error
    # Protobuf takes an empty file, and some bytes that are something else, for an empty message.
    if not model.ir_version or not model.graph.output:
        raise InvalidBundleError(
            f"{shown} is no ONNX graph: it has no IR version or no outputs. Fetch or export it again.", field="model"
        )
    return model


def _looked_up(node: NodeProto) -> Iterator[tuple[str, str]]:
    """Yield the names of tables and of what chooses their rows."""
    if node.op_type in {"Gather", "GatherBlockQuantized"}:
        axes = [attribute.i for attribute in node.attribute if attribute.name in {"axis", "gather_axis"}]
        if not any(axes):  # 0, or not given
            yield node.input[0], node.input[1]
    # https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    elif node.op_type == "EmbedLayerNormalization":
        yield node.input[2], node.input[0]
        yield node.input[4], node.input[1]


def _external_file(tensor: TensorProto, model_path: Path, root: Path, shown: str) -> str:
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    named = f"{shown}: the external data of tensor {tensor.name!r} is at {location!r}"
    parts = location.replace("\\", "/").split("/")
    if not location or parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InvalidBundleError(
            f"{named}, outside the folder of the graph. Export the model with its data beside it.", field="model"
        )
    path = model_path.parent / location
    if not path.is_file():
        raise InvalidBundleError(f"{named}, which is missing. Add the file to the bundle.", field="model")
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", 0))
    except ValueError as error:
        raise InvalidBundleError(
            f"{named} with an offset or length that is no number. Export it again.", field="model"
        ) from error
    size = path.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise InvalidBundleError(
            f"{named}, {length} bytes from byte {offset} on, but the file has {size}. Is it cut short? Fetch it again.",
            field="model",
        )
    return path.relative_to(root).as_posix()


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _tensors_of_sparse(graph.sparse_initializer)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in chain.from_iterable(node.attribute for node in nodes):
        yield from _tensors_of_attribute(attribute)


def _tensors_of_attribute(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    if attribute.HasField("g"):
        yield from _tensors_of_graph(attribute.g)
    if attribute.HasField("sparse_tensor"):
        yield from _tensors_of_sparse((attribute.sparse_tensor,))
    yield from attribute.tensors
    yield from _tensors_of_sparse(attribute.sparse_tensors)
    for graph in attribute.graphs:
        yield from _tensors_of_graph(graph)


def _tensors_of_sparse(tensors: Iterable[SparseTensorProto]) -> Iterator[TensorProto]:
    for sparse in tensors:
        yield sparse.values
        yield sparse.indices
