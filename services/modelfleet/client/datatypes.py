"""
The datatypes of the Open Inference Protocol, and how their elements are written raw.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

BYTES = "BYTES"

DATATYPES: Mapping[str, tuple[np.dtype[Any], str]] = MappingProxyType(
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
        BYTES: (np.dtype(np.object_), "bytes_contents"),
    }
)
"""By the protocol's name: numpy's dtype, and the field of InferTensorContents for elements that are not sent raw."""

_NAMES = {dtype: name for name, (dtype, _) in DATATYPES.items()}
_LENGTH = struct.Struct("<I")


def datatype(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype; object arrays hold BYTES. Raises KeyError where it has none."""
    return _NAMES[dtype.newbyteorder("<")]


def to_raw(array: Array) -> bytes:
    """Return the elements as raw contents; those of an object array are `bytes`, or `str` for their UTF-8."""
    if array.dtype.hasobject:
        return b"".join([_LENGTH.pack(len(data)) + data for data in map(as_bytes, array.ravel())])
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def from_raw(raw: bytes, dtype: np.dtype[Any], count: int) -> Array:
    """Return the elements [count]. Raises ValueError, which says why, when `raw` does not hold so many and no more."""
    if dtype.hasobject:
        return bytes_array(_elements(raw, count))
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"has {len(raw)} bytes, and its {count} elements have {count * dtype.itemsize}")
    return np.frombuffer(raw, dtype)


def bytes_array(elements: Sequence[bytes]) -> Array:
    """Return an object array [n] of `bytes`."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def as_bytes(element: str | bytes) -> bytes:
    """Return an element of BYTES; a text is its UTF-8."""
    return element.encode() if isinstance(element, str) else element


def _elements(raw: bytes, count: int) -> list[bytes]:
    """Each element is a little-endian uint32 length and that many bytes."""
    if count * _LENGTH.size > len(raw):
        raise ValueError(f"has {len(raw)} bytes, too few for the lengths of its {count} elements")
    elements: list[bytes] = []
    position = 0
    while len(elements) < count:
        end = position + _LENGTH.size
        end += _LENGTH.unpack_from(raw, position)[0] if end <= len(raw) else 0
        if end > len(raw):
            raise ValueError(
                f"ends inside element {len(elements)} of {count}, each of which is a length and so many bytes"
            )
        elements.append(raw[position + _LENGTH.size : end])
        position = end
    if position < len(raw):
        raise ValueError(f"has {len(raw) - position} bytes behind its {count} elements")
    return elements
