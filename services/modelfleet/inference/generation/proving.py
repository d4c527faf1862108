"""
What a generative model must show on its own device before it is READY, and the canary that it keeps.

Everything here is generated as requests are: through the queue, the engine and its batches.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.golden import GoldenExample
from modelfleet.bundle.golden_text import DEFAULT_LEAD, GoldenText, lead, read_text
from modelfleet.inference.canary import Canary
from modelfleet.inference.engine import Engine
from modelfleet.inference.generation import sequences
from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.generation.options import Grammar, Guidance, Options, Sampling
from modelfleet.inference.generation.sequences import Finish, Progress
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import (
    GoldenMismatchError,
    InsufficientMemoryError,
    InvalidBundleError,
    InvalidInputError,
    ModelfleetError,
    ModelLoadingError,
    OverloadedError,
)
from modelfleet.runtime.memory import peak_memory, reset_peak_memory, resident_memory

Ids = NDArray[np.int32]

# Short, and in a lane of its own: it takes little from the streams beside it.
_CANARY_TOKENS = 4
_CANARY_SEARCH_TOKENS = 16


async def prove(model: GenerativeModel, examples: Sequence[GoldenExample]) -> None:
    """
    Read the longest prompts that are read at once, continue the golden examples, and give the model its canary.

    The first shows a lack of memory, and takes first-time work off the first caller.
    Raises GoldenMismatchError, InsufficientMemoryError, InvalidBundleError.
    """
    texts = [read_text(example, model.manifest) for example in examples]
    try:
        await _warm_up(model)
    except OverloadedError as error:
        raise InsufficientMemoryError(f"{model.name} does not fit: {error.__cause__ or error}") from error
    except ModelfleetError as error:
        raise InvalidBundleError(f"The model generates nothing: {error.__cause__ or error}", field="model") from error
    await _check_golden(model, texts)
    shortest = min((text.prompt for text in texts), key=len, default=_blank(model, 1))
    model.canary = await _canary(model, shortest)


async def _warm_up(model: GenerativeModel) -> None:
    from modelfleet.inference.generation.decoding import BATCH_PROMPT_TOKENS  # noqa: PLC0415  needs the library

    resident = resident_memory()
    reset_peak_memory()
    await continued(model, _blank(model, 1), 2)
    rows = min(model.session.batch_rows, model.max_streams)
    longest = _blank(model, max(1, min(BATCH_PROMPT_TOKENS, model.context, model.cache_tokens) // rows - 2))
    await asyncio.gather(*(continued(model, longest, 2) for _ in range(rows)))
    with contextlib.suppress(InvalidInputError):  # whoever asks such a model for a grammar is told
        await continued(model, _blank(model, 1), 1, guidance=Guidance(Grammar.REGEX, "."))
    model.memory = replace(model.memory, host_peak_bytes=max(0, peak_memory() - resident))


async def _check_golden(model: GenerativeModel, texts: Sequence[GoldenText]) -> None:
    """Continue all examples side by side. Raises GoldenMismatchError for the first that differs."""
    least = model.manifest.golden_tolerance
    least = DEFAULT_LEAD if least is None else least
    provider = model.session.providers[0]
    outcomes = await asyncio.gather(*(_difference(model, text, least) for text in texts), return_exceptions=True)
    for text, outcome in zip(texts, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            raise GoldenMismatchError(
                f"{model.name} on {provider} fails on the golden example {text.name!r}: {outcome.__cause__ or outcome}"
            ) from outcome
        if outcome:
            raise GoldenMismatchError(
                f"{model.name} on {provider} differs from the golden example {text.name!r}: {outcome}. "
                "Is it the graph that the examples were recorded with? Record them again, or set golden_tolerance."
            )


async def _difference(model: GenerativeModel, text: GoldenText, least_lead: float) -> str:
    """
    Return how a continuation differs from the recorded one, or nothing.

    Where the recorded token led by less, another device may well choose another: it goes on behind the recorded one, so
    that what follows is checked all the same.
    """
    recorded, done = text.token_ids.tolist(), 0
    while done < len(recorded):
        ids, _ = await continued(model, np.concatenate([text.prompt, text.token_ids[:done]]), len(recorded) - done)
        pairs = zip(ids, recorded[done:], strict=False)
        same = next((at for at, (got, wanted) in enumerate(pairs) if got != wanted), len(ids))
        done += same
        if done < len(recorded) and lead(text.logprobs[done]) > least_lead:
            got = f"is {ids[same]}" if same < len(ids) else "is the end"
            probability = math.exp(text.logprobs[done])
            return f"token {done} {got} and not {recorded[done]}, which had a probability of {probability:.2f}"
        done += 1
    return ""


async def _canary(model: GenerativeModel, prompt: Ids) -> Canary:
    """
    Return what is asked at intervals: the first tokens after a prompt that this very device is certain of.

    What shares a paged engine with them rounds them otherwise, and that overturns none that leads by so much.
    """
    room = min(model.context, model.cache_tokens) - len(prompt)
    ids, logprobs = await continued(model, prompt, max(1, min(_CANARY_SEARCH_TOKENS, room)), logprobs=True)
    certain = [lead(logprob) >= DEFAULT_LEAD for logprob in logprobs]
    start = next((at for at, yes in enumerate(certain) if yes), len(ids))
    end = next((at for at, yes in enumerate(certain) if at > start and not yes), len(ids))
    expected = np.array(ids[start : min(end, start + _CANARY_TOKENS)], np.int32)
    begun = np.concatenate([prompt, np.array(ids[:start], np.int32)])
    return Canary(TokenTrial(begun, len(expected)), [expected], tolerance=0)


def _blank(model: GenerativeModel, length: int) -> Ids:
    return np.full(length, model.manifest.pad_token_id, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class TokenTrial:
    """A prompt (int32 [tokens]) of the worker's own, and how many of the tokens that follow are compared."""

    prompt: Ids
    count: int

    async def run(self, model: GenerativeModel, engine: Engine) -> list[Array]:
        """Return the tokens that follow the prompt; ahead of the queue, however long that is."""
        del engine
        ids, _ = await continued(model, self.prompt, max(1, self.count), ahead=True)
        return [np.array(ids[: self.count], np.int32)]


async def continued(
    model: GenerativeModel,
    prompt: Ids,
    max_tokens: int,
    *,
    guidance: Guidance | None = None,
    logprobs: bool = False,
    ahead: bool = False,
) -> tuple[list[int], list[float]]:
    """
    Return the likeliest tokens after a prompt (int32 [tokens]), and their log-probabilities when asked for.

    Raises what a request for it would be told.
    """
    ended: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()
    ids: list[int] = []
    found: list[float] = []

    def emit(progress: Progress) -> None:
        ids.extend(progress.token_ids)
        found.extend(progress.logprobs)
        if (progress.finish or progress.error) and not ended.done():
            ended.set_result(progress)

    options = Options(sampling=Sampling(temperature=0), guidance=guidance, logprobs=logprobs)
    sequence = sequences.Sequence(prompt, max_tokens, options, None, "", time.monotonic(), math.inf, emit, probe=True)
    decoding = model.decoding
    decoding.submit([sequence], ahead=ahead)
    try:
        progress = await ended
    finally:
        decoding.cancel([sequence])
    if progress.error:
        raise progress.error
    if progress.finish is Finish.CANCELLED:
        raise ModelLoadingError(f"{model.name} is being unloaded on this worker. Retry.")
    return ids, found
