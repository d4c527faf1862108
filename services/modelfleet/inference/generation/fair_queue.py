"""Who is next: the client that has been given the fewest tokens."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """Something that waits."""

    @property
    def client(self) -> str:
        """Whose it is."""
        ...

    @property
    def cost(self) -> int:
        """Tokens that its client is charged."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(slots=True)
class FairQueue(Generic[W]):
    """
    A queue for each client; the head of that one is next whose client has taken the fewest tokens.

    A client that comes anew starts level with those that wait: it can neither save up nor be made to catch up. This is
    start-time fair queueing, https://doi.org/10.1109/90.649569. Not safe for threads.
    """

    tokens: int = 0
    """Cost of all that wait."""
    _queues: dict[str, deque[W]] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)
    _level: int = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[W]:
        for queue in self._queues.values():
            yield from queue

    def put(self, one: W) -> None:
        """Add to the end of its client's queue."""
        if one.client not in self._queues:
            self._queues[one.client] = deque()
            self._taken[one.client] = max(self._taken.get(one.client, 0), self._level)
        self._queues[one.client].append(one)
        self.tokens += one.cost

    def heads(self) -> list[W]:
        """Return the heads of all queues, the next one first."""
        return [self._queues[client][0] for client in sorted(self._queues, key=self._taken.__getitem__)]

    def take(self, head: W) -> None:
        """Remove a head and charge its client."""
        self._level = self._taken[head.client]
        self._taken[head.client] += head.cost
        self._queues[head.client].popleft()
        self._forget(head)

    def drop(self, one: W) -> None:
        """Remove one that no longer waits, free of charge."""
        self._queues[one.client].remove(one)
        self._forget(one)

    def _forget(self, one: W) -> None:
        self.tokens -= one.cost
        if not self._queues[one.client]:
            del self._queues[one.client]
        # What clients without a place have taken matters only while it is above the level that they would start at.
        self._taken = {
            client: taken for client, taken in self._taken.items() if client in self._queues or taken > self._level
        }
