"""Whether what a model answers is numbers."""

from collections.abc import Sequence

import numpy as np

from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import NotFiniteError


def is_finite(array: Array) -> bool:
    """Whether an array has neither NaN nor infinity; one of no floats has not."""
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def finite_rows(rows: Sequence[Array] | Array) -> Sequence[bool]:
    """Return of each row whether it is finite."""
    if isinstance(rows, np.ndarray):
        return [bool(row.all()) for row in np.isfinite(rows.reshape(len(rows), -1))]
    return [is_finite(row) for row in rows]


def not_finite(
    model: str, remedy: str = "Its numbers overflow, as fp16's do beyond 65504: export it in fp32."
) -> NotFiniteError:
    """Return the error of a row that is not."""
    return NotFiniteError(f"{model} answers this input with NaN or infinity. {remedy}")
