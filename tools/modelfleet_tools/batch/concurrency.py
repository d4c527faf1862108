"""How many requests are under way: one more for each round that went well, half as many when the service refuses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

START = 4.0


@dataclass(frozen=True, slots=True)
class Slot:
    """A place among those under way, taken in a round: between two refusals."""

    round: int


class AdaptiveConcurrency:
    """Additive increase, multiplicative decrease, as in TCP: https://en.wikipedia.org/wiki/Additive_increase/multiplicative_decrease."""

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._limit = min(START, self._most)
        self._under_way = 0
        self._round = 0
        self._room = asyncio.Condition()
        self.highest = 0
        """The most that were under way at once."""

    @property
    def limit(self) -> int:
        """How many may be under way now, at least 1."""
        return int(self._limit)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait for a place and hold it."""
        async with self._room:
            await self._room.wait_for(lambda: self._under_way < self.limit)
            self._under_way += 1
        self.highest = max(self.highest, self._under_way)
        try:
            yield Slot(self._round)
        finally:
            self._under_way -= 1
            async with self._room:
                self._room.notify_all()

    def succeeded(self) -> None:
        """Take an answer as a sign that there is room for more: one more after `limit` of them."""
        self._limit = min(self._limit + 1 / self._limit, self._most)

    def refused(self, slot: Slot) -> None:
        """Halve, once for all requests that were under way together."""
        if slot.round == self._round:
            self._limit = max(self._limit / 2, 1.0)
            self._round += 1
