"""Arrays as the packed bytes that travel: little-endian, row-major, sequences one after another with their lengths."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Vectors: TypeAlias = npt.NDArray[np.float32]

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


def as_ids(sequence: npt.ArrayLike) -> Ids:
    """Return int32 [n]. Raises ValueError for what is no list of 32-bit integers."""
    array = np.asarray(sequence)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"token ids are a list of integers, not {array.dtype} of the shape {array.shape}")
    bounds = np.iinfo(np.int32)
    if array.size and (array.min() < bounds.min or array.max() > bounds.max):
        raise ValueError(f"token ids are 32-bit integers, not {array.min()} to {array.max()}")
    return array.astype(_INT32)


def pack_sequences(sequences: Sequence[npt.ArrayLike]) -> tuple[bytes, bytes]:
    """Return the ids of all sequences, and the sequences' lengths. Raises ValueError as `as_ids` does."""
    arrays = [as_ids(sequence) for sequence in sequences]
    lengths = np.array([len(array) for array in arrays], _INT32)
    return b"".join(array.tobytes() for array in arrays), lengths.tobytes()


def unpack_ints(packed: bytes) -> Ids:
    """Return int32 [n]."""
    return np.frombuffer(packed, _INT32).astype(np.int32)


def unpack_sequences(packed: bytes, lengths: Ids, width: int = 1) -> tuple[Ids, ...]:
    """Return one int32 array a sequence: [length], or [length, width] when each token has several values."""
    values = unpack_ints(packed).reshape((-1,) if width == 1 else (-1, width))
    return tuple(np.split(values, np.cumsum(lengths)[:-1])) if len(lengths) else ()


def unpack_vectors(packed: bytes, dimensions: int) -> Vectors:
    """Return float32 [n, dimensions]."""
    return np.frombuffer(packed, _FLOAT32).reshape(-1, dimensions).astype(np.float32)


def pack_vectors(vectors: npt.ArrayLike) -> bytes:
    """Return float32, row-major."""
    return np.ascontiguousarray(vectors, _FLOAT32).tobytes()
