"""Tensors of the Open Inference Protocol from and to numpy, on the server's side: nothing that arrives is trusted."""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import InvalidInputError

# The protocol's name of a type, numpy's, and the field of InferTensorContents that holds it when it is not sent raw.
_TYPES: Mapping[str, tuple[np.dtype[Any], str]] = MappingProxyType(
    {
        "BOOL": (np.dtype("?"), "bool_contents"),
        "INT8": (np.dtype("<i1"), "int_contents"),
        "INT16": (np.dtype("<i2"), "int_contents"),
        "INT32": (np.dtype("<i4"), "int_contents"),
        "INT64": (np.dtype("<i8"), "int64_contents"),
        "UINT8": (np.dtype("<u1"), "uint_contents"),
        "UINT16": (np.dtype("<u2"), "uint_contents"),
        "UINT32": (np.dtype("<u4"), "uint_contents"),
        "UINT64": (np.dtype("<u8"), "uint64_contents"),
        "FP16": (np.dtype("<f2"), ""),
        "FP32": (np.dtype("<f4"), "fp32_contents"),
        "FP64": (np.dtype("<f8"), "fp64_contents"),
        "BYTES": (np.dtype(np.object_), "bytes_contents"),
    }
)
_NAMES = {dtype: name for name, (dtype, _) in _TYPES.items()}
_LENGTH = struct.Struct("<I")


def datatype(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype; object arrays hold BYTES."""
    return _NAMES[dtype]


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Array]:
    """
    Return the inputs by name; BYTES as an object array of `bytes`.

    Raises InvalidInputError for an unknown datatype, a size that is not the shape's, or an input given twice.
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
        inputs[tensor.name] = _read(tensor, raw[index] if raw else None)
    return inputs


def write_outputs(
    response: pb.ModelInferResponse, outputs: Mapping[str, Array], wanted: Sequence[str], *, raw: bool
) -> None:
    """
    Add the wanted outputs to a response, or all where none is wanted by name.

    `raw` answers in raw_output_contents, as the request came; FP16 always does, since typed contents lack it.
    """
    if unknown := sorted(set(wanted) - set(outputs)):
        raise InvalidInputError(
            f"The model has no output {unknown[0]!r}. Its outputs are {', '.join(outputs)}.", field="outputs"
        )
    chosen = {name: outputs[name] for name in wanted} if wanted else outputs
    raw = raw or any(array.dtype == np.float16 for array in chosen.values())
    for name, array in chosen.items():
        tensor = response.outputs.add(name=name, datatype=datatype(array.dtype), shape=array.shape)
        if raw:
            response.raw_output_contents.append(_raw(array))
        else:
            elements = map(_as_bytes, array.ravel()) if array.dtype.hasobject else array.ravel().tolist()
            getattr(tensor.contents, _TYPES[tensor.datatype][1]).extend(elements)


def text_array(texts: Sequence[str]) -> Array:
    """Return an object array of UTF-8 bytes, as BYTES outputs are held."""
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return array


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Array:
    if tensor.datatype not in _TYPES:
        raise InvalidInputError(
            f"The input {tensor.name!r} has the datatype {tensor.datatype!r}. Use one of {', '.join(_TYPES)}.",
            field="inputs",
        )
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise InvalidInputError(
            f"The input {tensor.name!r} has the shape {list(shape)}; no size is negative.", field="inputs"
        )
    dtype, field = _TYPES[tensor.datatype]
    if raw is None:
        if not field:
            raise InvalidInputError(
                f"The input {tensor.name!r} is FP16, which is sent in raw_input_contents.", field="inputs"
            )
        elements: Any = getattr(tensor.contents, field)
        array = _bytes_array(list(elements)) if dtype.hasobject else _numbers(tensor.name, elements, dtype)
    elif dtype.hasobject:
        array = _bytes_array(list(_elements(tensor.name, raw)))
    else:
        if len(raw) % dtype.itemsize:
            raise _wrong_size(tensor.name, shape, f"{len(raw)} bytes")
        array = np.frombuffer(raw, dtype)
    if len(array) != math.prod(shape):
        raise _wrong_size(tensor.name, shape, f"{len(array)} elements")
    try:
        return array.reshape(shape)
    except ValueError as error:  # no elements in a huge shape, or too many dimensions
        raise InvalidInputError(
            f"The input {tensor.name!r} cannot have the shape {list(shape)}: {error}.", field="inputs"
        ) from None


def _numbers(name: str, elements: Sequence[float], dtype: np.dtype[Any]) -> Array:
    # Contents are wider than some of the types they hold, and numpy would wrap what does not fit.
    wide = np.array(elements)
    array = wide.astype(dtype)
    if array.dtype.kind in "iu" and (array != wide).any():
        raise InvalidInputError(f"The input {name!r} has a value outside of {dtype.name}.", field="inputs")
    return array


def _wrong_size(name: str, shape: tuple[int, ...], given: str) -> InvalidInputError:
    return InvalidInputError(
        f"The input {name!r} has {given}, and its shape {list(shape)} holds {math.prod(shape)} elements.",
        field="inputs",
    )


def _elements(name: str, raw: bytes) -> Iterator[bytes]:
    """Yield the elements of raw BYTES: each a little-endian uint32 length and that many bytes."""
    position = 0
    while position < len(raw):
        end = position + _LENGTH.size
        end += _LENGTH.unpack_from(raw, position)[0] if end <= len(raw) else 0
        if end > len(raw):
            raise InvalidInputError(
                f"The input {name!r} ends inside an element. Raw BYTES are length-prefixed elements.", field="inputs"
            )
        yield raw[position + _LENGTH.size : end]
        position = end


def _raw(array: Array) -> bytes:
    if array.dtype.hasobject:
        return b"".join(_LENGTH.pack(len(element)) + element for element in map(_as_bytes, array.ravel()))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _as_bytes(element: str | bytes) -> bytes:
    return element.encode() if isinstance(element, str) else element


def _bytes_array(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array
