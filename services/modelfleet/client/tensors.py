"""Tensors of the Open Inference Protocol from and to numpy."""

import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.runtime.errors import InvalidInputError

Array: TypeAlias = npt.NDArray[Any]

# The protocol's name of a type, numpy's, and the field of InferTensorContents that holds it when it is not sent raw.
_NUMERIC: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "BOOL": ("?", "bool_contents"),
        "INT8": ("<i1", "int_contents"),
        "INT16": ("<i2", "int_contents"),
        "INT32": ("<i4", "int_contents"),
        "INT64": ("<i8", "int64_contents"),
        "UINT8": ("<u1", "uint_contents"),
        "UINT16": ("<u2", "uint_contents"),
        "UINT32": ("<u4", "uint_contents"),
        "UINT64": ("<u8", "uint64_contents"),
        "FP16": ("<f2", ""),
        "FP32": ("<f4", "fp32_contents"),
        "FP64": ("<f8", "fp64_contents"),
    }
)
_BY_DTYPE = {np.dtype(name): datatype for datatype, (name, _) in _NUMERIC.items()}
_LENGTH = struct.Struct("<I")


def infer_request(model: str, model_version: str, inputs: Mapping[str, Array]) -> pb.ModelInferRequest:
    """Return a request with raw contents. Raises InvalidInputError for a dtype that the protocol does not have."""
    request = pb.ModelInferRequest(model_name=model, model_version=model_version)
    for name, value in inputs.items():
        array = np.asarray(value)
        datatype = _datatype(name, array)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(_raw(datatype, array))
    return request


def infer_outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """Return the outputs by name: BYTES as an object array of `bytes`, BF16 widened to float32."""
    raw = response.raw_output_contents
    return {
        tensor.name: (_from_raw(tensor.datatype, raw[index]) if raw else _from_contents(tensor)).reshape(tensor.shape)
        for index, tensor in enumerate(response.outputs)
    }


def _datatype(name: str, array: Array) -> str:
    if array.dtype.kind in "OSU":
        return "BYTES"
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes; numpy has none
        return "BF16"
    datatype = _BY_DTYPE.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise InvalidInputError(
            f"The input {name!r} has the dtype {array.dtype}, which cannot be sent. "
            "Use booleans, integers, floats of 16 to 64 bits, or strings.",
            field=name,
        )
    return datatype


def _raw(datatype: str, array: Array) -> bytes:
    if datatype == "BYTES":
        return b"".join(_prefixed(element) for element in array.ravel())
    if datatype == "BF16":
        return array.tobytes()
    return np.ascontiguousarray(array, _NUMERIC[datatype][0]).tobytes()


def _prefixed(element: object) -> bytes:
    if not isinstance(element, bytes | str):
        raise InvalidInputError(f"A BYTES tensor holds texts or bytes, not {element!r}. Convert it first.")
    data = element.encode() if isinstance(element, str) else element
    return _LENGTH.pack(len(data)) + data


def _from_raw(datatype: str, raw: bytes) -> Array:
    if datatype == "BYTES":
        return _object_array(list(_elements(raw)))
    if datatype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    dtype = np.dtype(_NUMERIC[datatype][0])
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))


def _elements(raw: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(raw):
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        yield raw[position : position + length]
        position += length


def _from_contents(tensor: pb.ModelInferResponse.InferOutputTensor) -> Array:
    if tensor.datatype == "BYTES":
        return _object_array(list(tensor.contents.bytes_contents))
    dtype, field = _NUMERIC[tensor.datatype]
    return np.array(getattr(tensor.contents, field), dtype)


def _object_array(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array
