"""
Whether rows may share a batch: found out when a version is loaded, on the device that will serve it.

A graph's first axis may count what is no batch: detections, steps of time, the rows of one table. And padding may
change what a row is answered, where a graph has no mask or leaks over it; so may the scales of dynamic quantization.
No form of the graph tells all of these. So rows are answered alone and then together, several times: what differs by
more than is tolerated is never joined with others' rows again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from modelfleet.bundle.graph import Precision, table_rows
from modelfleet.bundle.manifest import Batching, Manifest, Task
from modelfleet.inference.made_inputs import random_rows, random_tokens
from modelfleet.inference.models import LoadedModel, TensorModel, TextModel
from modelfleet.inference.self_test_runs import SelfTestRuns, SlowRunError
from modelfleet.inference.session import Device
from modelfleet.inference.sharing import Sharing
from modelfleet.inference.tensor_spec import Array
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError, ModelfleetError

_ROWS = 5
_JOINED = (2, 3, 5)
_SHORT = 12
# What is tried of a slow model ends here, but not before one kind of inputs has been.
_ENOUGH_S = 10.0
_ENOUGH_DRAWS = 4
_ORDER = (Batching.ALONE, Batching.SAME_SHAPE, Batching.PADDED)

Inputs = Mapping[str, Array]
_Answer = list[Array] | ModelfleetError


def tolerated(manifest: Manifest, precision: Precision, device: Device) -> float:
    """Return how far an answer in company may be from the answer alone, as a share of its magnitude."""
    if manifest.batching_tolerance is not None:
        return manifest.batching_tolerance
    # A CPU's kernels sum fp32 in another order for other sizes; a GPU's choose others, and multiply in TF32.
    exact = 1e-4 if device is Device.CPU else 5e-3
    return {Precision.FP32: exact, Precision.FP16: 1e-2, Precision.INT8: 0.1}[precision]


async def find_sharing(
    model: LoadedModel,
    runs: SelfTestRuns,
    samples: Sequence[Inputs],
    tolerance: float,
    made_up: list[Inputs] | None = None,
) -> Sharing:
    """
    Return what rows of the model share, as its manifest allows.

    `samples` are inputs of its graph that are known to be good; `made_up` is given one that the graph took. The model
    shares all that it could meanwhile. Raises InvalidBundleError for a manifest that asks for more than holds, or for a
    graph that answers no number to anything.
    """
    wanted = model.manifest.batching
    if wanted is Batching.ALONE:
        return Sharing(Batching.ALONE, reason="its manifest says so")
    if wanted and _ORDER.index(wanted) > _ORDER.index(model.widest):
        raise _more_than_holds(wanted, f"such a graph lets rows share at most {model.widest.value!r}")
    if model.widest is Batching.ALONE:
        why = "an input or output of its graph has no first axis that may vary"
        return Sharing(Batching.ALONE, reason=why)
    model.sharing = Sharing(model.widest)
    if isinstance(model, TextModel):
        found = await _of_texts(model, runs, tolerance)
    else:
        found = await _of_tensors(model, runs, samples, tolerance, [] if made_up is None else made_up)
    if found is None:
        why = "the graph took, or told apart, none of the inputs that were made up to find out"
        return Sharing(wanted, reason=why) if wanted else Sharing(Batching.ALONE, reason=why)
    if wanted is None:
        return found
    if _ORDER.index(wanted) > _ORDER.index(found.batching):
        raise _more_than_holds(wanted, found.reason)
    return Sharing(wanted, found.deviation)


def _more_than_holds(wanted: Batching, why: str) -> InvalidBundleError:
    return InvalidBundleError(
        f"The manifest says `batching: {wanted.value}`, but {why}. Remove the line, or allow what differs with "
        "`batching_tolerance`.",
        field="batching",
    )


async def _of_texts(model: TextModel, runs: SelfTestRuns, tolerance: float) -> Sharing | None:
    random = np.random.default_rng(0)
    longest = model.max_tokens
    short = min(longest, _SHORT)

    def texts(lengths: Sequence[int]) -> Tokens:
        return random_tokens(lengths, model.vocabulary_size, model.manifest.pad_token_id, random)

    alike, told_apart, shapes = 0.0, False, set[tuple[int, ...]]()
    for lengths in ([short] * _ROWS, [longest] * 2):
        tokens = texts(lengths)
        alone = [await _one(runs, _part(tokens, index, index + 1)) for index in range(len(lengths))]
        shapes |= {answer[0].shape for answer in alone if not isinstance(answer, ModelfleetError)}
        told_apart |= _differ(alone)
        for count in sorted({min(count, len(lengths)) for count in _JOINED}):
            alike = max(alike, await _texts_together(runs, _part(tokens, 0, count), alone[:count]))
        if alike > tolerance:
            return Sharing(Batching.ALONE, reason=_described("texts of the same length", alike, tolerance))
    if model.manifest.task is not Task.ENTITIES and len(shapes) > 1:
        raise InvalidBundleError(
            f"The output {model.output.name!r} has another width for a longer text: it is one of tokens. A model of "
            f"the task {model.manifest.task.value!r} has one of texts; name another with `output:`.",
            field="output",
        )
    # That texts of one length may share a run is known from here on: those of each length are answered at once.
    padded = 0.0
    few, long = [1, *range(2, short, 3), short], [max(1, longest // 2), longest]
    for lengths in (few, long) if model.fixed_tokens else (few, long, _many_short(short), _many_short(short)):
        tokens, expected = texts(lengths), list[_Answer]()
        for length in sorted(set(lengths)):
            first = lengths.index(length)
            answers = await runs.answers(
                _part(tokens, first, first + lengths.count(length)), [length] * lengths.count(length)
            )
            expected += answers.rows
        padded = max(padded, await _texts_together(runs, tokens, expected))
        if padded > tolerance:
            reason = _described("texts padded to one length", padded, tolerance)
            return Sharing(Batching.SAME_SHAPE, alike, reason)
    return Sharing(Batching.PADDED, max(alike, padded)) if told_apart else None


def _many_short(longest: int) -> list[int]:
    """Return many lengths of few tokens, in order: what padding adds weighs most there."""
    return sorted([1] * 32 + [min(2, longest)] * 16 + [min(4, longest)] * 8 + [longest])


async def _of_tensors(
    model: TensorModel, runs: SelfTestRuns, samples: Sequence[Inputs], tolerance: float, made_up: list[Inputs]
) -> Sharing | None:
    worst, telling, taken, answered, began = 0.0, 0, False, False, time.monotonic()
    for draw in random_rows(
        model.session.inputs, table_rows(model.session.graph), samples, _ROWS, np.random.default_rng(0)
    ):
        if telling and (time.monotonic() - began > _ENOUGH_S or telling >= _ENOUGH_DRAWS + len(samples)):
            break
        alone = await _alone(runs, draw)
        if alone is None:
            continue
        taken = True
        if any(not isinstance(answer, ModelfleetError) for answer in alone):
            answered = True
            made_up[:] = made_up or [{name: array[:1] for name, array in draw.items()}]
        for count in _JOINED:
            part = {name: array[:count] for name, array in draw.items()}
            worst = max(worst, await _together(runs, part, [1] * count, alone[:count]))
            if worst > tolerance:
                return Sharing(Batching.ALONE, reason=_described("rows of its first axis", worst, tolerance))
        telling += _differ(alone)
    if taken and not answered:
        raise InvalidBundleError(
            f"{model.name} answers whatever was tried with NaN or infinity. Export it again, or set `allow_nan: true` "
            "in its manifest if that is an answer.",
            field="model",
        )
    if not telling:
        return None
    return Sharing(Batching.SAME_SHAPE, worst)


async def _alone(runs: SelfTestRuns, draw: Inputs) -> list[_Answer] | None:
    """Return the answers to rows one by one; None where the graph refuses the first: it takes no such inputs."""
    answers: list[_Answer] = []
    for index in range(_ROWS):
        one = await runs.answers({name: array[index : index + 1] for name, array in draw.items()}, [1])
        if one.refused and not isinstance(one.refused, InvalidBundleError) and not answers:
            return None
        answers.append(one.rows[0])
    return answers


async def _one(runs: SelfTestRuns, tokens: Tokens) -> _Answer:
    return (await runs.answers(tokens, tokens.lengths.tolist())).rows[0]


async def _texts_together(runs: SelfTestRuns, tokens: Tokens, alone: Sequence[_Answer]) -> float:
    return await _together(runs, tokens, tokens.lengths.tolist(), alone)


async def _together(runs: SelfTestRuns, payload: Any, lengths: Sequence[int], alone: Sequence[_Answer]) -> float:
    """Return by how much answers differ when rows run together; infinite where they cannot, or take too long."""
    try:
        together = await runs.answers(payload, lengths)
    except SlowRunError:
        return np.inf
    return np.inf if together.refused else deviation(alone, together.rows)


def _part(tokens: Tokens, first: int, end: int) -> Tokens:
    return Tokens.whole(tokens.ids[tokens.starts[first] : tokens.starts[end]], tokens.lengths[first:end])


def _differ(answers: Sequence[_Answer]) -> bool:
    """Whether rows are told apart at all: where all are answered alike, nothing shows whose answer one has."""
    found = [answer for answer in answers if not isinstance(answer, ModelfleetError)]
    return any(
        not np.array_equal(a, b) for one, other in combinations(found, 2) for a, b in zip(one, other, strict=True)
    )


def deviation(alone: Sequence[_Answer], together: Sequence[_Answer]) -> float:
    """
    Return the largest difference, as a share of an answer's magnitude; infinite where more than numbers differ.

    An answer that is small among its like is measured by the middle of their magnitudes.
    """
    worst = 0.0
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, ModelfleetError) or isinstance(other, ModelfleetError):
            if type(one) is not type(other):
                return np.inf
            continue
        for position, (wanted, found) in enumerate(zip(one, other, strict=True)):
            worst = max(worst, _difference(wanted, found, list(_magnitudes(alone, position))))
    return worst


def _difference(wanted: Array, found: Array, magnitudes: Sequence[float]) -> float:
    if wanted.shape != found.shape:
        return np.inf
    if wanted.dtype.kind not in "fc":
        return 0.0 if np.array_equal(wanted, found) else np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))
        if same.all():
            return 0.0
        apart = np.abs(np.where(same, 0, wanted.astype(np.float64) - found))
        own = np.abs(wanted, dtype=np.float64)
        largest = float(own[np.isfinite(own)].max(initial=0.0))
    share = float(apart.max()) / (max(largest, float(np.median(magnitudes))) or 1.0)
    return share if np.isfinite(share) else np.inf


def _magnitudes(answers: Sequence[_Answer], position: int) -> Iterator[float]:
    for answer in answers:
        if not isinstance(answer, ModelfleetError):
            numbers = answer[position]
            if numbers.dtype.kind in "fc":
                yield float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))


def _described(rows: str, deviation: float, tolerance: float) -> str:
    if np.isinf(deviation):
        return f"{rows} are answered differently, or not at all, when they run together"
    return (
        f"{rows} differ from their answers alone by {deviation:.2g} of their magnitude when they run together, and "
        f"{tolerance:g} is tolerated"
    )
