"""
Golden examples: a few inputs of a graph, with the outputs that it gave when they were recorded.

A bundle keeps them as `golden.npz`, a zip of numpy arrays without pickled objects, so that any tool can write it:

- `names`: unicode [examples], what each is called, such as its text
- `<i>/input/<name>` and `<i>/output/<name>`: the tensors of example i by the graph's own names, batch dimension
  included; string tensors as unicode

The graph's raw tensors are kept, before pooling or labels: one form does for every task, needs no tokenizer to check,
and a difference is the device's or the graph's alone. https://numpy.org/doc/stable/reference/generated/numpy.savez.html
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.graph import Precision
from modelfleet.runtime.errors import GoldenMismatchError, InvalidBundleError

# Of the largest recorded magnitude. GPUs multiply fp32 in TF32, which keeps 10 bits; int8 kernels saturate differently
# from one CPU to the next. A wrong graph is off by the magnitude itself.
DEFAULT_TOLERANCES: Mapping[Precision, float] = MappingProxyType(
    {Precision.FP32: 0.005, Precision.FP16: 0.02, Precision.INT8: 0.1}
)

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class GoldenExample:
    """Tensors by name, batch dimension included."""

    name: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def write_golden(path: Path, examples: Sequence[GoldenExample]) -> None:
    """Write examples; what was there before is replaced once they are whole."""
    arrays: dict[str, Array] = {"names": np.array([example.name for example in examples], np.str_)}
    for index, example in enumerate(examples):
        for kind, tensors in (("input", example.inputs), ("output", example.outputs)):
            for name, array in tensors.items():
                arrays[f"{index}/{kind}/{name}"] = _objects_as_strings(array)
    written = path.with_suffix(".written")
    with written.open("wb") as file:
        # The type of numpy's stub has the flag allow_pickle among the arrays.
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    written.replace(path)


def read_golden(path: Path) -> tuple[GoldenExample, ...]:
    """Read what `write_golden` wrote. Raises InvalidBundleError for anything else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {key: _strings_as_objects(arrays[key]) for key in arrays.files}
        examples = tuple(
            GoldenExample(str(name), _tensors(found, index, "input"), _tensors(found, index, "output"))
            for index, name in enumerate(found.pop("names"))
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidBundleError(
            f"{path.name} holds no golden examples: {error}. Record them again with `modelfleet golden record`.",
            field=GOLDEN_FILE,
        ) from error
    for example in examples:
        if not example.inputs or not example.outputs:
            raise InvalidBundleError(
                f"{path.name}: the example {example.name!r} lacks inputs or outputs. Record it again.",
                field=GOLDEN_FILE,
            )
    return examples


def check_outputs(
    example: GoldenExample, outputs: Mapping[str, Array], *, tolerance: float, provider: str, model: str
) -> float:
    """
    Return the largest difference of `outputs` from the recorded ones.

    Raises GoldenMismatchError, naming the example, the output, the difference and the provider, when it passes
    `tolerance`.
    """
    differences = {
        name: difference(recorded, outputs[name]) if name in outputs else math.inf
        for name, recorded in example.outputs.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= tolerance:
        raise GoldenMismatchError(
            f"{model} on {provider} differs from the golden example {example.name!r}: output {worst!r} by "
            f"{differences[worst]:.3g} of its largest magnitude, and {tolerance:g} is tolerated. "
            "Is it the graph that the examples were recorded with? Record them again, or set golden_tolerance."
        )
    return differences[worst]


def difference(recorded: Array, got: Array) -> float:
    """
    Return the largest difference as a share of the largest recorded magnitude; infinite where shapes differ.

    Where a recorded number is not finite, the other must be the same. Strings are equal or infinitely apart.
    """
    if recorded.shape != got.shape:
        return math.inf
    if np.object_ in (recorded.dtype, got.dtype):
        return 0.0 if _as_text(recorded) == _as_text(got) else math.inf
    wanted, found = recorded.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(wanted[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return math.inf
    wanted, found = wanted[finite], found[finite]
    if not wanted.size:
        return 0.0
    largest = float(np.abs(wanted).max())
    return float(np.abs(found - wanted).max()) / (largest or 1.0)


def _tensors(found: Mapping[str, Array], index: int, kind: str) -> Mapping[str, Array]:
    prefix = f"{index}/{kind}/"
    return {key.removeprefix(prefix): array for key, array in found.items() if key.startswith(prefix)}


def _objects_as_strings(array: Array) -> Array:
    return np.array(_as_text(array), np.str_).reshape(array.shape) if array.dtype == np.object_ else array


def _strings_as_objects(array: Array) -> Array:
    return array.astype(np.object_) if array.dtype.kind == "U" else array


def _as_text(array: Array) -> list[str]:
    return [element.decode() if isinstance(element, bytes) else str(element) for element in array.ravel()]
