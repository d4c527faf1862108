"""Tensors of the Open Inference Protocol from and to numpy, on the server's side: nothing that arrives is trusted."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.client.datatypes import BYTES, DATATYPES, as_bytes, bytes_array, datatype, from_raw, to_raw
from modelfleet.inference.oip_parameters import class_count
from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.inference.tokens import TextUsage
from modelfleet.runtime.errors import InvalidInputError

# As numpy has it.
_MAX_DIMENSIONS = 64
# About 1.5 us each are read one by one; more than this would hold up the event loop longer than a thread's hop.
_INLINE_ELEMENTS = 500


def takes_long_to_read(request: pb.ModelInferRequest) -> bool:
    """Return whether a request has many elements that are read one by one: BYTES, and contents that are not raw."""
    return (
        sum(
            math.prod(tensor.shape[:_MAX_DIMENSIONS])
            for tensor in request.inputs
            if tensor.datatype == BYTES or not request.raw_input_contents
        )
        > _INLINE_ELEMENTS
    )


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Array]:
    """
    Return the inputs by name; BYTES as an object array of `str`.

    Raises InvalidInputError for an unknown datatype, a size that is not the shape's, BYTES that are not UTF-8, or an
    input given twice.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInputError(
            f"There are {len(request.inputs)} inputs and {len(raw)} raw_input_contents. Give one for each, or none.",
            field="raw_input_contents",
        )
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise InvalidInputError(f"The input {tensor.name!r} is given twice. Give it once.", field="inputs")
        if raw and tensor.HasField("contents"):
            raise InvalidInputError(
                f"The input {tensor.name!r} has contents beside raw_input_contents. Give one of them.", field="inputs"
            )
        inputs[tensor.name] = _read(tensor, raw[index] if raw else None)
    return inputs


def wanted_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """
    Return the outputs to answer, in order, each with how many classes are asked for in place of its numbers, or 0.

    Raises InvalidInputError for one that the model does not have, that is asked for twice, or with other parameters.
    """
    names = [spec.name for spec in specs]
    wanted: dict[str, int] = {}
    for output in request.outputs:
        if output.name not in names:
            raise InvalidInputError(
                f"The model has no output {output.name!r}. Its outputs are {', '.join(names)}.", field="outputs"
            )
        if output.name in wanted:
            raise InvalidInputError(f"The output {output.name!r} is asked for twice. Ask once.", field="outputs")
        wanted[output.name] = class_count(output)
    return wanted or dict.fromkeys(names, 0)


def write_outputs(
    response: pb.ModelInferResponse, outputs: Mapping[str, Array], wanted: Sequence[str], *, raw: bool
) -> None:
    """
    Add the wanted outputs to a response.

    `raw` answers in raw_output_contents, as the request came; FP16 always does, since typed contents lack it.
    """
    chosen = {name: outputs[name] for name in wanted}
    raw = raw or any(array.dtype == np.float16 for array in chosen.values())
    for name, array in chosen.items():
        tensor = response.outputs.add(name=name, datatype=datatype(array.dtype), shape=array.shape)
        if raw:
            response.raw_output_contents.append(to_raw(array))
        else:
            elements = map(as_bytes, array.ravel()) if array.dtype.hasobject else array.ravel().tolist()
            getattr(tensor.contents, DATATYPES[tensor.datatype][1]).extend(elements)


def write_usage(response: pb.ModelInferResponse, usage: Sequence[TextUsage]) -> None:
    """Say of each text, as JSON lists in parameters, how many tokens it had, whether it was cut, and its windows."""
    if not usage:
        return
    response.parameters["token_counts"].string_param = json.dumps([text.token_count for text in usage])
    response.parameters["truncated"].string_param = json.dumps([text.truncated for text in usage])
    response.parameters["window_counts"].string_param = json.dumps([text.window_count for text in usage])


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Array:
    if tensor.datatype not in DATATYPES:
        raise InvalidInputError(
            f"The input {tensor.name!r} has the datatype {tensor.datatype!r}. Use one of {', '.join(DATATYPES)}.",
            field="inputs",
        )
    shape = _shape(tensor)
    dtype, field = DATATYPES[tensor.datatype]
    if raw is not None:
        try:
            array = from_raw(raw, dtype, math.prod(shape))
        except ValueError as error:
            raise InvalidInputError(
                f"The input {tensor.name!r} of shape {list(shape)} {error}.", field="inputs"
            ) from None
    elif field:
        elements: Any = getattr(tensor.contents, field)
        if len(elements) != math.prod(shape):
            raise InvalidInputError(
                f"The input {tensor.name!r} has {len(elements)} elements, and its shape {list(shape)} holds "
                f"{math.prod(shape)}.",
                field="inputs",
            )
        array = bytes_array(list(elements)) if dtype.hasobject else _numbers(tensor.name, elements, dtype)
    else:
        raise InvalidInputError(
            f"The input {tensor.name!r} is FP16, which is sent in raw_input_contents.", field="inputs"
        )
    try:
        return (_decoded(tensor.name, array) if dtype.hasobject else array).reshape(shape)
    except ValueError as error:  # no elements in a huge shape
        raise InvalidInputError(
            f"The input {tensor.name!r} cannot have the shape {list(shape)}: {error}.", field="inputs"
        ) from None


def _shape(tensor: pb.ModelInferRequest.InferInputTensor) -> tuple[int, ...]:
    if len(tensor.shape) > _MAX_DIMENSIONS:
        raise InvalidInputError(
            f"The input {tensor.name!r} has {len(tensor.shape)} dimensions; a tensor has at most {_MAX_DIMENSIONS}.",
            field="inputs",
        )
    if any(size < 0 for size in tensor.shape):
        raise InvalidInputError(
            f"The input {tensor.name!r} has the shape {list(tensor.shape)}; no size is negative.", field="inputs"
        )
    return tuple(tensor.shape)


def _decoded(name: str, elements: Array) -> Array:
    texts = np.empty_like(elements)
    for index, element in enumerate(elements):
        try:
            texts[index] = element.decode()
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                f"The input {name!r}, element {index} is not UTF-8: byte {error.start} is "
                f"0x{element[error.start]:02x}. Encode texts as UTF-8.",
                field="inputs",
            ) from None
    return texts


def _numbers(name: str, elements: Sequence[float], dtype: np.dtype[Any]) -> Array:
    # Contents are wider than some of the types they hold, and numpy would wrap what does not fit.
    wide = np.array(elements)
    array = wide.astype(dtype)
    if array.dtype.kind in "iu" and (array != wide).any():
        raise InvalidInputError(f"The input {name!r} has a value outside of {dtype.name}.", field="inputs")
    return array
