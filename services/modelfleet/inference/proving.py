"""What a loaded model must show on its own device before it is READY: golden examples, and what it can do."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import structlog

from modelfleet.bundle.golden import GoldenExample, check_outputs
from modelfleet.bundle.graph import Precision
from modelfleet.inference import graph_limits
from modelfleet.inference.batch_growth import BatchGrowth
from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.canary import Canary, Trial
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import Job
from modelfleet.inference.made_inputs import random_tokens
from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.models import LoadedModel, TensorModel, TextModel
from modelfleet.inference.row_independence import find_sharing, tolerated
from modelfleet.inference.self_test_runs import SelfTestRuns, cause, no_memory
from modelfleet.inference.session import RunCancellation
from modelfleet.inference.statistics import ModelRecord
from modelfleet.inference.tasks.tensors import blank
from modelfleet.inference.tensor_spec import Array
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    GoldenMismatchError,
    InvalidBundleError,
    InvalidInputError,
    NotFiniteError,
    OverloadedError,
    SessionFailureError,
)

_log = structlog.get_logger()

Inputs = Mapping[str, Array]
Samples = Sequence[Inputs]

_CANARY_TOKENS = 4
# Words that a model answers with no number are rare, or it is of no use.
_CANARY_TRIES = 16


async def check_golden(model: LoadedModel, engine: Engine, examples: Sequence[GoldenExample], tolerance: float) -> None:
    """Run the examples one by one. Raises GoldenMismatchError for the first whose outputs are not the recorded ones."""
    provider = model.session.providers[0]
    runs = _GoldenRuns(model)
    engine.attach(runs)
    try:
        for example in examples:
            try:
                (outputs,) = await Trial(example, [1]).results(runs, engine)
            except SessionFailureError as error:
                raise GoldenMismatchError(
                    f"{model.name} on {provider} fails on the golden example {example.name!r}: {cause(error)}"
                ) from error
            check_outputs(example, outputs, tolerance=tolerance, provider=provider, model=model.name)
    finally:
        engine.detach(runs)


async def self_test(
    model: LoadedModel,
    engine: Engine,
    budget: MemoryBudget,
    samples: Samples,
    *,
    precision: Precision,
    tolerance: float,
) -> None:
    """
    Find out what the model can do, in the engine's turns, and leave it attached to the engine.

    It is given what its rows share, what a batch and a text may hold, its figures of memory, and its canary, whose
    answers may change by `tolerance`. A `tensor` model is asked `samples`; without any, zeros or made-up inputs are
    tried: where those are none of its inputs, that proves nothing against it; it has no canary then, and `unwatched`
    says why. Raises InsufficientMemoryError, InvalidBundleError, FatalDeviceError.
    """
    with SelfTestRuns(model, engine) as runs:
        growth = BatchGrowth(model, runs, budget, tolerated(model.manifest, precision, model.session.device))
        if isinstance(model, TextModel):
            trial: Trial | None = await _test_texts(model, runs, growth)
        else:
            trial = await _test_tensors(model, runs, growth, samples)
    model.self_tested = isinstance(model, TextModel) or bool(samples)
    _log.info("self-test", version=model.name, **asdict(model.sharing), limits=asdict(model.limits))
    engine.attach(model)
    try:
        if trial:
            model.canary = await _canary(model, engine, trial, tolerance)
    except (InvalidBundleError, NotFiniteError) as error:
        if isinstance(model, TextModel) or samples:
            engine.detach(model)
            raise
        model.unwatched = _unwatched(f"made-up inputs do not show what it does: {error.message.rstrip('.')}")
    except BaseException:
        engine.detach(model)
        raise


async def _test_texts(model: TextModel, runs: SelfTestRuns, growth: BatchGrowth) -> Trial:
    """Return what its canary is to ask: a short text that is answered with numbers."""
    await graph_limits.fit(model, runs)
    model.sharing = await find_sharing(model, runs, (), growth.tolerance)
    random, longest, limits = np.random.default_rng(0), model.max_tokens, model.limits

    def texts(lengths: list[int]) -> Tokens:
        return random_tokens(lengths, model.vocabulary_size, model.manifest.pad_token_id, random)

    first = texts([longest])

    def batch(rows: int) -> tuple[Tokens, list[int]]:
        lengths = [longest] * rows
        tokens = texts(lengths)
        tokens.ids[:longest] = first.ids
        return tokens, lengths

    most = min(limits.max_rows, max(1, limits.max_tokens // longest))
    if (rows := await growth.largest(batch, most)) < most:
        model.bound(replace(limits, max_tokens=rows * longest))
    length = min(longest, _CANARY_TOKENS)
    for _ in range(_CANARY_TRIES):
        short = texts([length])
        (answer,) = (await runs.answers(short, [length])).rows
        if not isinstance(answer, NotFiniteError):
            return Trial(short, [length])
    raise InvalidBundleError(
        f"{model.name} answers texts of any words with NaN or infinity. Export it again, in fp32 where its numbers "
        "overflow.",
        field="model",
    )


async def _test_tensors(model: TensorModel, runs: SelfTestRuns, growth: BatchGrowth, samples: Samples) -> Trial | None:
    """Return what its canary is to ask; None where nothing says what it takes, which `unwatched` tells."""
    made_up: list[Inputs] = []
    model.sharing = await find_sharing(model, runs, samples, growth.tolerance, made_up)
    by_size = sorted(samples, key=lambda sample: sum(array.nbytes for array in sample.values()))
    if samples:
        return await _grown(model, growth, by_size[0], by_size[-1])
    zeros = blank(model.session.inputs)
    why = "it takes inputs of any shape"
    for inputs in ([zeros] if zeros else []) + made_up:
        try:
            return await _grown(model, growth, inputs, inputs)
        except InvalidBundleError as error:
            why = f"made-up inputs do not show what it does: {error.message.rstrip('.')}"
    model.unwatched = _unwatched(why)
    return None


async def _grown(model: TensorModel, growth: BatchGrowth, smallest: Inputs, largest: Inputs) -> Trial:
    if not model.batches:
        for inputs in (smallest, largest):
            await growth.largest(partial(_alone, inputs), 1)
        return Trial(smallest, [1])

    def batch(rows: int) -> tuple[Inputs, list[int]]:
        return {name: np.repeat(array[:1], rows, axis=0) for name, array in largest.items()}, [1] * rows

    limits = model.limits
    model.bound(replace(limits, max_tokens=await growth.largest(batch, limits.max_tokens)))
    return Trial(smallest, [1] * len(next(iter(smallest.values()))))


def _alone(inputs: Inputs, _rows: int) -> tuple[Inputs, list[int]]:
    return inputs, [1]


async def _canary(model: LoadedModel, engine: Engine, trial: Trial, tolerance: float) -> Canary:
    try:
        canary = Canary(trial, await trial.run(model, engine), tolerance)
        changed = canary.difference(await trial.run(model, engine))
    except OverloadedError as error:
        raise no_memory(model.name, str(trial)) from error
    except (SessionFailureError, InvalidInputError) as error:
        raise InvalidBundleError(f"The graph fails on {trial}: {cause(error)}", field="model") from error
    if changed > tolerance:
        raise InvalidBundleError(
            f"The graph answers {trial} anew each time, by {changed:.3g} of its magnitude.", field="model"
        )
    return canary


def _unwatched(why: str) -> str:
    return (
        f"neither warmed up nor watched: it has no golden examples, and {why}. "
        "Record some with `modelfleet golden record`."
    )


class _GoldenRuns:
    """A model's session as the engine runs it for golden examples: raw tensors in and out, one example a batch."""

    limits = BatchLimits(max_tokens=1)
    self_tested = False

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
