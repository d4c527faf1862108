"""Tensors of the Open Inference Protocol from and to numpy, as a client sends and gets them."""

import math
from collections.abc import Mapping

import numpy as np

from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.client.datatypes import BYTES, DATATYPES, Array, bytes_array, datatype, from_raw, to_raw
from modelfleet.runtime.errors import InvalidInputError

_BFLOAT16 = "BF16"  # numpy has none; arrays of the package ml_dtypes are sent, and what arrives becomes float32


def infer_request(model: str, model_version: str, inputs: Mapping[str, Array]) -> pb.ModelInferRequest:
    """Return a request with raw contents. Raises InvalidInputError for a dtype that the protocol does not have."""
    request = pb.ModelInferRequest(model_name=model, model_version=model_version)
    for name, value in inputs.items():
        array = np.asarray(value)
        request.inputs.add(name=name, datatype=_datatype(name, array), shape=array.shape)
        request.raw_input_contents.append(to_raw(array.astype(object) if array.dtype.kind in "SU" else array))
    return request


def infer_outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """Return the outputs by name: BYTES as an object array of `bytes`, BF16 widened to float32."""
    raw = response.raw_output_contents
    return {
        tensor.name: (_from_raw(tensor, raw[index]) if raw else _from_contents(tensor)).reshape(tensor.shape)
        for index, tensor in enumerate(response.outputs)
    }


def _datatype(name: str, array: Array) -> str:
    if array.dtype.kind in "SU":
        return BYTES
    if array.dtype.name == "bfloat16":
        return _BFLOAT16
    try:
        found = datatype(array.dtype)
    except KeyError:
        raise InvalidInputError(
            f"The input {name!r} has the dtype {array.dtype}, which cannot be sent. "
            "Use booleans, integers, floats of 16 to 64 bits, or strings.",
            field=name,
        ) from None
    if found == BYTES:
        for element in array.ravel():
            if not isinstance(element, bytes | str):
                raise InvalidInputError(f"A BYTES tensor holds texts or bytes, not {element!r}. Convert it first.")
    return found


def _from_raw(tensor: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Array:
    if tensor.datatype == _BFLOAT16:  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    dtype, _ = DATATYPES[tensor.datatype]
    array = from_raw(raw, dtype, math.prod(tensor.shape))
    return array if dtype.hasobject else array.astype(dtype.newbyteorder("="))


def _from_contents(tensor: pb.ModelInferResponse.InferOutputTensor) -> Array:
    dtype, field = DATATYPES[tensor.datatype]
    elements = getattr(tensor.contents, field)
    return bytes_array(list(elements)) if dtype.hasobject else np.array(elements, dtype)
