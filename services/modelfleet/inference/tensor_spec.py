"""Tensors by name, dtype and shape."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph. A dimension is a number, or None where it may vary."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
