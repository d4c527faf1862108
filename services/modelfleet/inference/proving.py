"""What a loaded model must show on its own device before it is READY: its golden examples, and its largest batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from modelfleet.bundle.golden import GoldenExample, check_outputs
from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.canary import Canary, Trial
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import Job
from modelfleet.inference.memory_budget import SMALLER_BATCHES, MemoryBudget
from modelfleet.inference.models import LoadedModel, TensorModel
from modelfleet.inference.session import RunCancellation
from modelfleet.inference.statistics import ModelRecord
from modelfleet.inference.tasks.tensors import blank
from modelfleet.inference.tensor_spec import Array
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    GoldenMismatchError,
    InsufficientMemoryError,
    InvalidBundleError,
    InvalidInputError,
    OverloadedError,
    SessionFailureError,
)
from modelfleet.runtime.memory import peak_memory, reset_peak_memory, resident_memory

# Of the largest batch; what it takes tells what the whole would, before the kernel kills the process for it.
_PARTS = 4


async def check_golden(model: LoadedModel, engine: Engine, examples: Sequence[GoldenExample], tolerance: float) -> None:
    """Run the examples one by one. Raises GoldenMismatchError for the first whose outputs are not the recorded ones."""
    provider = model.session.providers[0]
    runs = _GoldenRuns(model)
    engine.attach(runs)
    try:
        for example in examples:
            try:
                (outputs,) = await engine.submit(runs, example, [1], deadline=math.inf, probe=True)
            except SessionFailureError as error:
                raise GoldenMismatchError(
                    f"{model.name} on {provider} fails on the golden example {example.name!r}: {_cause(error)}"
                ) from error
            check_outputs(example, outputs, tolerance=tolerance, provider=provider, model=model.name)
    finally:
        engine.detach(runs)


async def warm_up(
    model: LoadedModel, engine: Engine, budget: MemoryBudget, samples: Sequence[Mapping[str, Array]], tolerance: float
) -> None:
    """
    Run batches up to the largest that is allowed; give the model its canary and the figures of its peak.

    A `tensor` model runs `samples`, one or more. Raises InsufficientMemoryError, InvalidBundleError.
    """
    trials = _tensor_trials(model, samples) if isinstance(model, TensorModel) else _text_trials(model)
    smallest, part, largest = trials
    growth = _Growth(budget)
    canary = Canary(smallest, await _answer(model, engine, smallest), tolerance)
    once = growth.now()  # what a first run takes, whatever its size
    await _answer(model, engine, part)
    grown = growth.now()
    host_bytes, device_bytes = ((_PARTS - 1) * (now - at_once) for now, at_once in zip(grown, once, strict=True))
    budget.require(model.name, host_bytes, device_bytes, f"to run {largest} at once")
    await _answer(model, engine, largest)
    budget.require_kept(model.name, f"after {largest} at once")
    host_bytes, device_bytes = growth.now()
    model.memory = replace(model.memory, host_peak_bytes=host_bytes, device_peak_bytes=device_bytes)
    if (changed := canary.difference(await _answer(model, engine, smallest))) > tolerance:
        raise InvalidBundleError(
            f"The graph answers {smallest} anew each time, by {changed:.3g} of its magnitude.", field="model"
        )
    model.canary = canary


async def warm_up_with_zeros(model: TensorModel, engine: Engine, budget: MemoryBudget, tolerance: float) -> None:
    """
    Warm up a model of which nothing says what inputs it takes: zeros are tried.

    Where they are none of its inputs, that proves nothing against it: it has no canary then, and `unwatched` says why.
    Raises InsufficientMemoryError.
    """
    zeros = blank(model.session.inputs)
    if zeros is None:
        why = "it takes inputs of any shape"
    else:
        try:
            await warm_up(model, engine, budget, [zeros], tolerance)
        except InvalidBundleError as error:
            why = f"zeros do not show what it does: {error.message.rstrip('.')}"
        else:
            return
    model.unwatched = (
        f"neither warmed up nor watched: it has no golden examples, and {why}. "
        "Record some with `modelfleet golden record`."
    )


class _Growth:
    """By how much the peak has grown since this was made. A device's arena keeps what it takes: that is its peak."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._before = budget.left()
        self._resident = resident_memory()
        reset_peak_memory()

    def now(self) -> tuple[int, int]:
        """Return bytes of the host and of the device."""
        _, device_bytes = self._budget.left().since(self._before)
        return max(0, peak_memory() - self._resident), device_bytes


class _GoldenRuns:
    """A model's session as the engine runs it for golden examples: raw tensors in and out, one example a batch."""

    limits = BatchLimits(max_tokens=1)

    def __init__(self, model: LoadedModel) -> None:
        self.name = model.name
        self.record = ModelRecord()
        self._session = model.session

    def collate(self, rows: Sequence[Row[Job]]) -> GoldenExample:
        (row,) = rows
        example: GoldenExample = row.request.payload
        return example

    def run(self, inputs: GoldenExample, cancellation: RunCancellation) -> Mapping[str, Array]:
        names = list(inputs.outputs)
        return dict(zip(names, self._session.run(inputs.inputs, names, cancellation), strict=True))

    def reduce(self, outputs: Mapping[str, Array], rows: Sequence[Row[Job]]) -> Sequence[Mapping[str, Array]]:
        del rows
        return [outputs]

    def new_cancellation(self) -> RunCancellation:
        return RunCancellation()


def _text_trials(model: LoadedModel) -> Iterator[Trial]:
    """Yield one token, a part of the largest batch, and the largest batch."""
    longest = model.manifest.max_tokens or 1
    widest = max(1, model.limits.max_tokens // longest)
    part = (widest // _PARTS, longest) if widest >= _PARTS else (widest, max(1, longest // _PARTS))
    for rows, length in ((1, 1), part, (widest, longest)):
        tokens = Tokens(
            ids=np.full(rows * length, model.manifest.pad_token_id, np.int32),
            lengths=np.full(rows, length, np.int32),
            type_ids=None,
            offsets=None,
            window_counts=np.ones(rows, np.int32),
            token_counts=np.full(rows, length, np.int32),
        )
        yield Trial(tokens, [length] * rows)


def _tensor_trials(model: TensorModel, samples: Sequence[Mapping[str, Array]]) -> Iterator[Trial]:
    """Yield the smallest sample and the largest; where the graph has a batch dimension, its first row many times."""
    by_size = sorted(samples, key=lambda sample: sum(array.nbytes for array in sample.values()))
    smallest, largest = by_size[0], by_size[-1]
    if not model.batches:
        yield from (Trial(inputs, [1]) for inputs in (smallest, largest, largest))
        return
    yield Trial(smallest, [1] * len(next(iter(smallest.values()))))
    rows = model.limits.max_tokens
    for count in (max(1, rows // _PARTS), rows):
        yield Trial({name: np.repeat(array[:1], count, axis=0) for name, array in largest.items()}, [1] * count)


async def _answer(model: LoadedModel, engine: Engine, trial: Trial) -> list[Array]:
    try:
        return await trial.run(model, engine)
    except OverloadedError as error:
        raise InsufficientMemoryError(
            f"{model.name} does not fit: the device's memory is full at {trial}. "
            f"Assign fewer versions to this worker, or have it {SMALLER_BATCHES}."
        ) from error
    except (SessionFailureError, InvalidInputError) as error:
        raise InvalidBundleError(f"The graph fails on {trial}: {_cause(error)}", field="model") from error


def _cause(error: SessionFailureError | InvalidInputError) -> str:
    """Return what ONNX Runtime said, on one line."""
    return " ".join(str(error.__cause__).split())
