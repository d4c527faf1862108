"""Whether a graph gives what its source gives: on real inputs, and on random ones of all shapes it says to take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from modelfleet.bundle.golden import Array, difference
from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export.graph import Graph
from modelfleet_tools.export.source import BATCH, Axis, Inputs, Source

# Of the largest magnitude: what the order of sums in fp32 leaves, with room.
FP32_TOLERANCE = 0.001
_LARGEST_BATCH = 8
_SEED = 20260101

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Parity:
    """
    How far a graph is from its source.

    `shapes` counts the shapes that were run. `worst` is the largest difference as a share of the largest magnitude of
    an output, found at `worst_shape`, sizes by axis, `real` the largest on real inputs.
    """

    shapes: int
    worst: float
    worst_shape: Mapping[str, int]
    real: float


def compare(
    graph: Graph, source: Source, *, every: bool, progress: Progress | None = None, reference: Source | None = None
) -> Parity:
    """
    Run graph and source on the source's own inputs and on random ones.

    The shapes go from 1 to the largest size of each axis: with `every`, all sizes of all axes but the batch. Raises
    InvalidBundleError where the graph does not take a shape, or its outputs have another.
    """
    _check_signature(graph, source)
    wanted = (reference or source).run
    real = _worst(graph, source.inputs, wanted)
    shapes = list(_shapes(source, every=every))
    generator = np.random.default_rng(_SEED)
    worst, worst_shape = real, _sizes_of(source)
    for done, shape in enumerate(shapes, 1):
        found = _worst(graph, _random(source, shape, generator), wanted)
        if found > worst:
            worst, worst_shape = found, shape
        if progress:
            progress(done, len(shapes))
    return Parity(len(shapes), worst, worst_shape, real)


def check(parity: Parity, tolerance: float = FP32_TOLERANCE) -> None:
    """Raise InvalidBundleError when the difference passes `tolerance`."""
    if not parity.worst <= tolerance:
        shape = ", ".join(f"{name} {size}" for name, size in parity.worst_shape.items())
        raise InvalidBundleError(
            f"The graph differs from its source by {parity.worst:.3g} of the largest output at {shape}; {tolerance:g} "
            "is tolerated.",
            field="model",
        )


def _check_signature(graph: Graph, source: Source) -> None:
    if missing := set(source.inputs) - set(graph.inputs):
        raise InvalidBundleError(
            f"The graph takes {', '.join(graph.inputs)} and not {', '.join(sorted(missing))}: the module does not use "
            "what it is given.",
            field="model",
        )


def _worst(graph: Graph, inputs: Inputs, wanted: Callable[[Inputs], Mapping[str, Array]]) -> float:
    expected, got = wanted(inputs), graph.run(inputs)
    for name, array in expected.items():
        if got[name].shape != array.shape:
            raise InvalidBundleError(
                f"The graph's output {name!r} has the shape {list(got[name].shape)} where its source gives "
                f"{list(array.shape)}: a dimension is fixed that should vary.",
                field="model",
            )
    return max(difference(array, got[name]) for name, array in expected.items())


def _shapes(source: Source, *, every: bool) -> Iterator[Mapping[str, int]]:
    """Yield sizes by axis. While other axes run over their sizes, the batch takes each small size in turn."""
    axes = {axis.name: axis for name in source.inputs for axis in source.varying(name).values()}
    others = {name: _sizes(axis, every=every) for name, axis in axes.items() if name != BATCH}
    # Of all lengths, small batches: what a size changes shows in two rows as in eight.
    batches = [size for size in ((1, 2) if every else (1, 2, 3, _LARGEST_BATCH)) if BATCH in axes] or [0]
    steps = max([len(sizes) for sizes in others.values()], default=0)
    for step in range(max(steps, len(batches))):
        shape = {name: sizes[step % len(sizes)] for name, sizes in others.items()}
        yield shape | ({BATCH: batches[step % len(batches)]} if BATCH in axes else {})
    # All at their least, and at their largest, which the turns above may not have met.
    for pick in (min, max):
        corner = {name: pick(sizes) for name, sizes in others.items()}
        yield from (corner | {BATCH: size} for size in batches[:2] if size) if BATCH in axes else (corner,)


def _sizes(axis: Axis, *, every: bool) -> Sequence[int]:
    if every:
        return range(axis.least, axis.largest + 1)
    powers = (2**exponent for exponent in range(axis.largest.bit_length()))
    near = {size + offset for size in (*powers, axis.largest) for offset in (-1, 0, 1)}
    return sorted(size for size in near | {axis.least} if axis.least <= size <= axis.largest)


def _sizes_of(source: Source) -> Mapping[str, int]:
    return {
        axis.name: array.shape[dimension]
        for name, array in source.inputs.items()
        for dimension, axis in source.varying(name).items()
    }


def _random(source: Source, sizes: Mapping[str, int], generator: np.random.Generator) -> Inputs:
    """Return inputs like the source's own: integers of the same range, masks that end, floats of the same spread."""
    filled = {}
    for name, example in source.inputs.items():
        axes = source.varying(name)
        shape = [
            sizes[axes[dimension].name] if dimension in axes else size for dimension, size in enumerate(example.shape)
        ]
        filled[name] = _like(name, example, shape, generator)
    return filled


def _like(name: str, example: Array, shape: Sequence[int], generator: np.random.Generator) -> Array:
    if name == "attention_mask":
        rows, length = shape
        lengths = generator.integers(1, length + 1, rows)
        lengths[0] = length
        return (np.arange(length) < lengths[:, None]).astype(example.dtype)
    if example.dtype.kind == "f":
        return generator.normal(example.mean(), example.std() or 1.0, shape).astype(example.dtype)
    if example.dtype.kind == "b":
        return generator.random(shape) < 0.5  # noqa: PLR2004  a coin
    return generator.integers(int(example.min()), int(example.max()) + 1, shape).astype(example.dtype)
