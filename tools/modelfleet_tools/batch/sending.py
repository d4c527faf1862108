"""Portions sent until each row has a result or has failed for good."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError

from modelfleet_tools.batch.concurrency import AdaptiveConcurrency
from modelfleet_tools.batch.filling import Failed, Portion, Row, TokenEstimate
from modelfleet_tools.batch.tasks import Ask, Result

# Rows, and characters of text, that may be read and not yet written: what bounds memory.
MOST_ROWS = 4096
MOST_CHARACTERS = 16 << 20

_TRIES = 8
# A request that was too slow will be again; part of one that failed has failed before.
_TRIES_OF_SUSPECTS = 2
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 15.0
_NOT_FOUND_PATIENCE_S = 30.0
_FIELDS_OF_ROWS = ("texts", "query", "documents")

# Never a row's fault; tried again until patience ends.
_SERVICES_FAULT = (errors.OverloadedError, errors.NotFoundError, errors.NotServedHereError)


@dataclass(frozen=True, slots=True)
class Answered:
    """A row's result. The text, which may be long, is let go of."""

    number: int
    kept: Mapping[str, object]
    result: Result


Outcome: TypeAlias = Answered | Failed


class Sender:
    """
    Sends portions, tries again with growing pauses, and finds the rows that are at fault.

    An error that names rows, or that is the request's fault, is narrowed down to its rows. Any other is tried again.
    While nothing at all is answered for `patience_s`, the service is at fault, and the last error is raised. While
    other requests are answered, the rows of one that failed 8 times, or 2 times by being too slow, are tried in halves,
    until a single row that fails alone has failed for good.
    """

    def __init__(
        self,
        ask: Ask,
        concurrency: AdaptiveConcurrency,
        estimate: TokenEstimate,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._concurrency = concurrency
        self._estimate = estimate
        self._patience_s = patience_s
        self._clock = clock
        self._last_answer = clock()
        self.retries = 0

    async def send(self, portion: Portion) -> list[Outcome]:
        """Return what came of each row, in order. Raises the error that no retry helps against."""
        outcomes = iter(await self._settle([row for row in portion if isinstance(row, Row)]))
        return [row if isinstance(row, Failed) else next(outcomes) for row in portion]

    async def _settle(self, rows: Sequence[Row], tries_allowed: int = _TRIES) -> list[Outcome]:
        if not rows:
            return []
        first_failure, tries = 0.0, 0
        while True:
            try:
                return await self._try(rows)
            except ModelfleetError as error:
                if _names_rows(error):
                    return await self._narrow(rows, error)
                now = self._clock()
                first_failure = first_failure or now
                tries += 1
                others_answered = self._last_answer > first_failure
                if not others_answered and now - max(first_failure, self._last_answer) > self._patience_for(error):
                    raise
                if isinstance(error, errors.DeadlineExpiredError):
                    tries_allowed = _TRIES_OF_SUSPECTS
                if others_answered and tries >= tries_allowed and not isinstance(error, _SERVICES_FAULT):
                    return await self._narrow(rows, error)
                self.retries += 1
                await asyncio.sleep(_pause_s(tries, error))

    async def _try(self, rows: Sequence[Row]) -> list[Outcome]:
        async with self._concurrency.slot() as slot:
            try:
                results = await self._ask([row.inputs for row in rows])
            except (errors.OverloadedError, errors.DeadlineExpiredError):
                self._concurrency.refused(slot)
                raise
        self._concurrency.succeeded()
        self._last_answer = self._clock()
        self._estimate.learn(sum(row.inputs.characters for row in rows), sum(result.tokens for result in results))
        return [Answered(row.number, row.kept, result) for row, result in zip(rows, results, strict=True)]

    async def _narrow(self, rows: Sequence[Row], error: ModelfleetError) -> list[Outcome]:
        if len(rows) == 1:
            (row,) = rows
            return [Failed(row.number, row.place, error.reason.value, error.message)]
        blamed = [index for index in error.indexes if index < len(rows)]
        if not blamed:
            halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
            return [outcome for half in halves for outcome in await self._settle(half, _TRIES_OF_SUSPECTS)]
        others = [row for index, row in enumerate(rows) if index not in blamed]
        answered = iter(await self._settle(others, _TRIES_OF_SUSPECTS))
        alone = {index: (await self._settle([rows[index]], _TRIES_OF_SUSPECTS))[0] for index in blamed}
        return [alone.get(index) or next(answered) for index in range(len(rows))]

    def _patience_for(self, error: ModelfleetError) -> float:
        missing = isinstance(error, errors.NotFoundError)
        return min(self._patience_s, _NOT_FOUND_PATIENCE_S) if missing else self._patience_s


def _names_rows(error: ModelfleetError) -> bool:
    """Whether rows are at fault, so that no retry helps them. Raises an error that no row gets through with."""
    if isinstance(error, errors.InvalidInputError):
        if isinstance(error, errors.WrongTaskError) or not (error.field or "texts").startswith(_FIELDS_OF_ROWS):
            raise error
        return True
    return bool(error.indexes)


async def in_order(
    portions: AsyncIterator[Portion], send: Callable[[Portion], Coroutine[Any, Any, list[Outcome]]]
) -> AsyncIterator[list[Outcome]]:
    """Send portions at once, as far ahead as memory is allowed to be used, and yield their outcomes in order."""
    pending: deque[tuple[float, asyncio.Task[list[Outcome]]]] = deque()
    load = 0.0
    try:
        async for portion in portions:
            load += _load(portion)
            pending.append((_load(portion), asyncio.create_task(send(portion))))
            while pending and (load > 1 or pending[0][1].done()):
                released, task = pending.popleft()
                yield await task
                load -= released
        while pending:
            yield await pending.popleft()[1]
    finally:
        for _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


def _load(portion: Portion) -> float:
    characters = sum(row.inputs.characters for row in portion if isinstance(row, Row))
    return len(portion) / MOST_ROWS + characters / MOST_CHARACTERS


def _pause_s(tries: int, error: ModelfleetError) -> float:
    # Full jitter, so that callers who failed together do not come back together:
    # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    longest = min(_FIRST_PAUSE_S * 2**tries, _LONGEST_PAUSE_S)
    return (error.retry_after_s or 0.0) + random.uniform(0, longest)  # noqa: S311  no secret
