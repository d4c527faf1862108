"""Raw tensors: whether they fit a graph, and how rows become outputs again."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.runtime.errors import InvalidInputError


def check(
    inputs: Mapping[str, Array], specs: Sequence[TensorSpec], *, batches: bool, nan: bool
) -> tuple[int, Hashable]:
    """
    Return how many rows the inputs have, and a key: requests with equal keys may share a batch.

    Raises InvalidInputError for an input that is missing, unknown, of another dtype or shape than the graph's, or that
    holds NaN where `nan` is not allowed.
    """
    names = {spec.name for spec in specs}
    if unknown := sorted(set(inputs) - names):
        raise InvalidInputError(
            f"The model has no input {unknown[0]!r}. Its inputs are {', '.join(sorted(names))}.", field="inputs"
        )
    for spec in specs:
        if spec.name not in inputs:
            raise InvalidInputError(f"The input {spec.name!r} is missing. It is {_described(spec)}.", field="inputs")
        _check_one(inputs[spec.name], spec, nan=nan)
    if not batches:
        return 1, None
    sizes = {name: len(array) for name, array in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidInputError(f"The inputs' first dimensions differ: {sizes}. Make them equal.", field="inputs")
    rows = next(iter(sizes.values()))
    if not rows:
        raise InvalidInputError("The inputs' first dimension is 0. Give at least one element.", field="inputs")
    return rows, tuple((name, inputs[name].shape[1:]) for name in sorted(inputs))


def blank(specs: Sequence[TensorSpec]) -> dict[str, Array] | None:
    """Return one element of zeros, or of empty strings; None where more than the first dimension may vary."""
    if any(size is None for spec in specs for size in spec.shape[1:]):
        return None
    shapes = {spec.name: tuple(1 if size is None else size for size in spec.shape) for spec in specs}
    return {spec.name: np.full(shapes[spec.name], "" if spec.dtype == np.object_ else 0, spec.dtype) for spec in specs}


def joined(results: Sequence[Sequence[Array]], names: Sequence[str]) -> dict[str, Array]:
    """Return outputs by name from the outputs of each row."""
    if len(results) == 1:
        return dict(zip(names, results[0], strict=True))
    return {name: np.concatenate([row[index] for row in results]) for index, name in enumerate(names)}


def _check_one(array: Array, spec: TensorSpec, *, nan: bool) -> None:
    if array.dtype != spec.dtype:
        raise InvalidInputError(
            f"The input {spec.name!r} has the dtype {array.dtype}. It is {_described(spec)}.", field="inputs"
        )
    fits = len(array.shape) == len(spec.shape) and all(
        wanted is None or wanted == given for wanted, given in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidInputError(
            f"The input {spec.name!r} has the shape {list(array.shape)}. It is {_described(spec)}.", field="inputs"
        )
    if not nan and np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
        place: Any = np.argwhere(np.isnan(array))[0].tolist()
        raise InvalidInputError(
            f"The input {spec.name!r} is NaN at {place}. Clean it, or set `allow_nan: true` in the model's manifest.",
            field="inputs",
        )


def _described(spec: TensorSpec) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return f"{spec.dtype} [{shape}]"
