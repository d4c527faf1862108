"""
One hop to the tokenizer service for the new tokens of all streams.

Streams that have new tokens while a call is in flight, or soon after the last one, share the next: there is at most one
call in `pace_s`, however many streams there are and however fast they run. The calls are whole in themselves, so
that any replica answers any of them and a restart of the service loses nothing.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from modelfleet.inference.generation import metrics
from modelfleet.runtime.errors import DeadlineExpiredError, TokenizerUnreachableError, UnavailableError

# At 25 ms a stream looks as smooth as token by token to a reader.
_PACE_S = 0.025
_TRIES = 4
_PAUSE_S = 0.25


class Detokenizer(Protocol):
    """The tokenizer service."""

    async def detokenize(self, digest: str, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[str]:
        """Return one text a sequence. Raises TokenizerUnreachableError, or what the service raised."""


@dataclass(eq=False, slots=True)
class _Waiting:
    sequences: list[list[int]]
    tokens: int
    future: asyncio.Future[list[str]]


class Detokenization:
    """Coalesces calls for each tokenizer."""

    def __init__(self, detokenizer: Detokenizer, pace_s: float = _PACE_S, timeout_s: float = 5.0) -> None:
        self._detokenizer = detokenizer
        self._pace_s = pace_s
        self._timeout_s = timeout_s
        self._waiting: dict[str, list[_Waiting]] = {}
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._next_call: dict[str, float] = {}

    async def decode(self, digest: str, sequences: list[list[int]], *, tokens: int) -> list[str]:
        """Return one text a sequence; `tokens` counts the new ones. Raises TokenizerUnreachableError."""
        waiting = _Waiting(sequences, tokens, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(digest, []).append(waiting)
        if digest not in self._calls:
            self._calls[digest] = asyncio.create_task(self._call_until_none_waits(digest))
        return await waiting.future

    async def _call_until_none_waits(self, digest: str) -> None:
        try:
            while self._waiting.get(digest):
                await asyncio.sleep(max(0, self._next_call.get(digest, -math.inf) - time.monotonic()))
                self._next_call[digest] = time.monotonic() + self._pace_s
                await self._call(digest, [one for one in self._waiting.pop(digest) if not one.future.done()])
        finally:
            del self._calls[digest]
            if len(self._next_call) > len(self._calls):
                now = time.monotonic()
                self._next_call = {key: due for key, due in self._next_call.items() if due > now}

    async def _call(self, digest: str, group: list[_Waiting]) -> None:
        if not group:
            return
        metrics.DETOKENIZE_STREAMS.observe(len(group))
        metrics.DETOKENIZE_TOKENS.observe(sum(one.tokens for one in group))
        try:
            texts = iter(await self._texts(digest, [ids for one in group for ids in one.sequences]))
        except Exception as error:  # noqa: BLE001  whatever it is, it goes to those who wait; the next call is made
            for one in group:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        for one in group:
            parts = [next(texts) for _ in one.sequences]
            if not one.future.done():
                one.future.set_result(parts)

    async def _texts(self, digest: str, sequences: list[list[int]]) -> list[str]:
        """
        Call, and call again while the service is away or stuck for a moment: what was generated would be lost.

        The deadline of such a call is ours and none of the callers', who may have no end of time.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._detokenizer.detokenize(digest, sequences, self._timeout_s)
            except DeadlineExpiredError as error:
                if not tries_left:
                    raise TokenizerUnreachableError(
                        f"The tokenizer service did not answer within {self._timeout_s:g} s, {_TRIES} times. Retry."
                    ) from error
            except UnavailableError:
                if not tries_left:
                    raise
                await asyncio.sleep(_PAUSE_S)
        raise AssertionError  # the last try returns or raises
