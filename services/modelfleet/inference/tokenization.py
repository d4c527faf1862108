"""
One hop to the tokenizer service, shared.

Requests that arrive while a call is in flight leave together in the next one: under load the hop's cost is divided by
many, and when idle nothing waits. Where more waits than a call carries, waiting longer saves none: another call starts,
so that all threads and replicas of the service work. Only requests with equal options share a call. A large request,
whose call takes long anyway, has one of its own beside them.
"""

import asyncio
import re
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from modelfleet.inference.tokens import Tokens
from modelfleet.runtime import telemetry, tracing
from modelfleet.runtime.errors import DeadlineExpiredError, InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.context import Context

# A shared call carries the ids of at most this many requests.
_LOGGED_IDS = 8
# Calls of requests with equal options under way at once.
_MOST_CALLS = 4
# The field of an error that one text of a call is to blame for.
_WORD_OF_PAIRS = re.compile(r"\b(?P<half>texts|pairs)\b(?P<index>\[\d+\])?")
_NAMED_TEXT = re.compile(r"(?:texts|pairs)\[(\d+)\]")


class Truncation(StrEnum):
    """What happens to a text with more tokens than the model takes, when it is not covered by windows."""

    RIGHT = "RIGHT"
    LEFT = "LEFT"
    FORBIDDEN = "FORBIDDEN"


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How texts become windows of token ids. `stride` is None where texts are cut instead of windowed."""

    tokenizer_digest: str
    max_tokens: int
    truncation: Truncation = Truncation.RIGHT
    stride: int | None = None
    with_offsets: bool = False
    special_tokens: bool = True
    rendered: bool = False
    control_tokens_as_text: bool = False


class Tokenizer(Protocol):
    """The tokenizer service."""

    async def tokenize(
        self, options: TokenizeOptions, texts: Sequence[str], pairs: Sequence[str], timeout_s: float
    ) -> Tokens:
        """Return the windows of all texts. Raises TokenizerUnreachableError, or what the service raised."""


@dataclass(eq=False, slots=True)
class _Waiting:
    texts: Sequence[str]
    pairs: Sequence[str]
    characters: int
    deadline: float
    request_id: str
    trace: "Context | None"
    future: asyncio.Future[Tokens]


@dataclass(eq=False, slots=True)
class _Line:
    """Requests with equal options that wait, their characters, and what makes the calls for them."""

    waiting: list[_Waiting] = field(default_factory=list)
    characters: int = 0
    calls: set["asyncio.Task[None] | None"] = field(default_factory=set)


class Tokenization:
    """Coalesces calls; `max_characters` bounds those in a shared one, and a request with more goes alone."""

    def __init__(self, tokenizer: Tokenizer, max_characters: int = 1 << 17) -> None:
        self._tokenizer = tokenizer
        self._max_characters = max_characters
        self._lines: dict[TokenizeOptions, _Line] = {}

    async def tokenize(
        self, options: TokenizeOptions, texts: Sequence[str], *, deadline: float, pairs: Sequence[str] = ()
    ) -> Tokens:
        """
        Return the windows of `texts`, or of pairs with one of `pairs` each.

        `deadline` is in seconds on the monotonic clock. Raises DeadlineExpiredError, TokenizerUnreachableError,
        InvalidInputError.
        """
        future: asyncio.Future[Tokens] = asyncio.get_running_loop().create_future()
        characters = sum(map(len, texts)) + sum(map(len, pairs))
        waiting = _Waiting(
            texts, pairs, characters, deadline, telemetry.request_id.get(), tracing.current_trace(), future
        )
        if characters > self._max_characters:
            await self._call(options, [waiting])
            return future.result()
        line = self._lines.get(options)
        if line is None:
            line = self._lines[options] = _Line()
        line.waiting.append(waiting)
        line.characters += characters
        if not line.calls or (line.characters > self._max_characters and len(line.calls) < _MOST_CALLS):
            line.calls.add(asyncio.create_task(self._call_while_needed(options, line)))
        return await future

    async def _call_while_needed(self, options: TokenizeOptions, line: _Line) -> None:
        """Make one call after another, until none waits or another caller is enough for those who do."""
        try:
            while line.waiting and (len(line.calls) == 1 or line.characters > self._max_characters):
                await self._call(options, self._next_group(line))
        finally:
            line.calls.discard(asyncio.current_task())
            if not line.calls:
                del self._lines[options]

    def _next_group(self, line: _Line) -> list[_Waiting]:
        """Take the oldest requests that somebody waits for and that fit one call: all pairs, or none."""
        waiting = [one for one in line.waiting if not one.future.done()]
        group, characters = waiting[:1], waiting[0].characters if waiting else 0
        for one in waiting[1:]:
            characters += one.characters
            if characters > self._max_characters or bool(one.pairs) != bool(group[0].pairs):
                break
            group.append(one)
        line.waiting = waiting[len(group) :]
        line.characters = sum(one.characters for one in line.waiting)
        return group

    async def _call(self, options: TokenizeOptions, group: list[_Waiting]) -> None:
        if not group:  # all who waited have left
            return
        texts = [text for one in group for text in one.texts]
        pairs = [pair for one in group for pair in one.pairs]
        timeout_s = max(one.deadline for one in group) - time.monotonic()
        if timeout_s <= 0:
            _reject(group, DeadlineExpiredError("The deadline passed before the text was tokenized. Allow more time."))
            return
        tracing.follow_trace(group[0].trace)  # a span has one parent: the others' stage shows how long they waited
        ids = ",".join([one.request_id for one in group[:_LOGGED_IDS]])
        telemetry.request_id.set(ids[: telemetry.LONGEST_REQUEST_ID])
        try:
            tokens = await self._tokenizer.tokenize(options, texts, pairs, timeout_s)
        except InvalidInputError as error:
            if len(group) == 1:
                _reject(group, error)
            else:  # one request's fault must not fail the others
                await asyncio.gather(*(self._call(options, part) for part in _divided(group, error)))
        except Exception as error:  # noqa: BLE001  whatever it is, it goes to those who wait; the next call is made
            _reject(group, error)
        else:
            for one, part in zip(group, _split(tokens, [len(one.texts) for one in group]), strict=True):
                if not one.future.done():
                    one.future.set_result(part)


def of_documents(error: InvalidInputError) -> InvalidInputError:
    """Return the error in the words of reranking, where all texts are one query and the pairs are documents."""
    message, field = (_WORD_OF_PAIRS.sub(_word_of_documents, said) for said in (error.message, error.field or ""))
    return type(error)(message, field=field)


def _word_of_documents(word: re.Match[str]) -> str:
    if word["half"] == "texts" and word["index"]:
        return "query"
    return f"documents{word['index'] or ''}"


def _divided(group: list[_Waiting], error: InvalidInputError) -> list[list[_Waiting]]:
    """
    Return what to send anew of a call that was refused: the request whose text is named alone, and two halves.

    Halves find any number of requests at fault in a few calls one after another, and those that cannot be named: a
    shared call may exceed a limit that none of its requests does.
    """
    owner: list[_Waiting] = []
    if named := _NAMED_TEXT.fullmatch(error.field or ""):
        at = bisect_right([*accumulate(len(one.texts) for one in group)], int(named[1]))
        owner = group[at : at + 1]
    others = [one for one in group if one not in owner and not one.future.done()]
    middle = len(others) // 2
    return [part for part in (owner, others[:middle], others[middle:]) if part]


def _reject(group: list[_Waiting], error: Exception) -> None:
    for one in group:
        if not one.future.done():
            one.future.set_exception(error)


def _split(tokens: Tokens, text_counts: Sequence[int]) -> list[Tokens]:
    """Divide the windows of many texts into those of consecutive groups of texts."""
    if len(text_counts) == 1:
        return [tokens]
    texts = np.concatenate(([0], np.cumsum(text_counts)))
    windows = np.concatenate(([0], np.cumsum(tokens.window_counts)))[texts]
    bounds = tokens.starts[windows].tolist()
    parts = []
    for index in range(len(text_counts)):
        first, end = bounds[index], bounds[index + 1]
        parts.append(
            Tokens(
                ids=tokens.ids[first:end],
                lengths=tokens.lengths[windows[index] : windows[index + 1]],
                type_ids=None if tokens.type_ids is None else tokens.type_ids[first:end],
                offsets=None if tokens.offsets is None else tokens.offsets[first:end],
                window_counts=tokens.window_counts[texts[index] : texts[index + 1]],
                token_counts=tokens.token_counts[texts[index] : texts[index + 1]],
            )
        )
    return parts
