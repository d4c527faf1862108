"""
A serialized ONNX graph without its weights: what is left is small, and parses at once.

To parse all of it holds the interpreter for as long as its bytes take to copy, a second and more for a large model, and
nobody is answered meanwhile. So the wire format is walked, and the weights' bytes are left where they are.
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator
from dataclasses import dataclass

# ModelProto.graph, GraphProto.initializer, TensorProto.raw_data of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_TO_TENSORS = (7, 5)
_RAW_DATA = 9

_VARINT, _FIXED_64, _BYTES, _GROUP, _GROUP_END, _FIXED_32 = range(6)
_SIZES = {_FIXED_64: 8, _GROUP: 0, _GROUP_END: 0, _FIXED_32: 4}
_LONGEST_VARINT = 10


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message: from its tag, at `start`, over its content, at `content`, to its `end`."""

    number: int
    kind: int
    start: int
    content: int
    end: int


def without_weights(model: memoryview) -> bytes:
    """Return a serialized ModelProto without the `raw_data` of its initializers. Raises ValueError where it is none."""
    return _stripped(model, _TO_TENSORS)


def _stripped(message: memoryview, way: tuple[int, ...]) -> bytes:
    parts: list[bytes | memoryview] = []
    for field in _fields(message):
        if way and field.number == way[0] and field.kind == _BYTES:
            inner = _stripped(message[field.content : field.end], way[1:])
            parts += [_varint(field.number << 3 | _BYTES), _varint(len(inner)), inner]
        elif way or field.number != _RAW_DATA:
            parts.append(message[field.start : field.end])
    return b"".join(parts)


def _fields(message: memoryview) -> Iterator[_Field]:
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            content = position
            _, position = _read_varint(message, position)
        elif kind == _BYTES:
            size, content = _read_varint(message, position)
            position = content + size
        elif kind in _SIZES:
            content, position = position, position + _SIZES[kind]
        else:
            raise ValueError(f"there is no wire type {kind}")
        if position > len(message):
            raise ValueError(f"a field ends at byte {position} of {len(message)}")
        yield _Field(number, kind, start, content, position)


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number of variable length and where it ends."""
    value = 0
    for index, byte in enumerate(message[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:  # noqa: PLR2004  the high bit says that there is more
            return value, position + index + 1
    raise ValueError(f"the number at byte {position} does not end")


def _varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:  # noqa: PLR2004  as above
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
