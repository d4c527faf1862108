"""
Which rows run together next.

A row is one sequence of a request (or one element of a tensor batch). Rows wait by length. A batch starts with a row
of the request whose turn it is and takes neighbours of similar length while padded tokens stay within the budget.

Turns: requests go by age, and a request that has had a turn goes to the back, so that one with many rows shares the
engine fairly with small ones. A request whose deadline is near has its first turn by that instead, as if it were
older. No request starves: its age is fixed while everybody else's turn moves on.

Nothing here knows of threads; the engine holds a lock around each call.
"""

import heapq
import itertools
import math
import sys
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

# A request whose deadline is less than this far off competes for its first turn as if it had arrived this long before
# its deadline.
URGENCY_HORIZON_S = 1.0

RequestT = TypeVar("RequestT", bound="Request")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold, in padded tokens: rows times the longest row."""

    max_tokens: int
    """Budget. A single row longer than this runs alone."""
    min_fill: float = 0.9
    """Least share of real tokens among padded ones."""
    free_tokens: int = 0
    """Up to this many padded tokens, padding costs no time on this device, so `min_fill` does not apply."""
    max_rows: int = sys.maxsize
    """Most rows."""


@dataclass(slots=True, eq=False)
class Request:
    """
    One caller's rows.

    `lengths` are the tokens of each row; only rows with equal `key` may share a batch. `arrival` and `deadline` are
    seconds on the monotonic clock.
    """

    lengths: Sequence[int]
    arrival: float
    deadline: float
    key: Hashable
    # Rows that wait, in order; a dict because rows also leave from the middle.
    waiting: "dict[int, Row[Self]]" = field(init=False, default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Row(Generic[RequestT]):
    """Row `index` of a request."""

    request: RequestT
    index: int
    length: int


class BatchQueue(Generic[RequestT]):
    """The rows that wait for one model."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._by_length: dict[Hashable, _LengthIndex[RequestT]] = {}
        # A heap with lazy deletion: requests that have left are skipped when they come up.
        self._turns: list[tuple[float, int, RequestT]] = []
        self._order = itertools.count()
        self._requests: dict[RequestT, None] = {}
        # No deadline of those that wait is earlier, so that most looks for expired ones end here.
        self._next_deadline = math.inf
        self.rows = 0
        self.tokens = 0

    def put(self, request: RequestT) -> None:
        """Let all rows of a request wait: at least one, each of at least one token."""
        assert min(request.lengths, default=0) > 0, f"lengths are {request.lengths}"
        index = self._by_length.setdefault(request.key, _LengthIndex())
        for number, length in enumerate(request.lengths):
            row = Row(request, number, length)
            request.waiting[number] = row
            index.add(row)
        self.rows += len(request.lengths)
        self.tokens += sum(request.lengths)
        self._enqueue(request, min(request.arrival, request.deadline - URGENCY_HORIZON_S))
        self._requests[request] = None
        self._next_deadline = min(self._next_deadline, request.deadline)

    def discard(self, request: RequestT) -> None:
        """Forget the waiting rows of a request that nobody waits for."""
        for row in list(request.waiting.values()):
            self._remove(row)

    def requests(self) -> list[RequestT]:
        """Return the requests that have rows waiting."""
        return list(self._requests)

    def take_expired(self, now: float) -> list[RequestT]:
        """Remove and return the requests whose deadline has passed before all of their rows had run."""
        if now < self._next_deadline:
            return []
        expired = [request for request in self._requests if request.deadline <= now]
        for request in expired:
            self.discard(request)
        self._next_deadline = min((request.deadline for request in self._requests), default=math.inf)
        return expired

    def take_batch(self, now: float) -> list[Row[RequestT]]:
        """Remove and return the rows of the next batch, at least one; empty when nothing waits."""
        head = self._next_turn()
        if head is None:
            return []
        first = next(iter(head.waiting.values()))
        batch = list(self._neighbours(first))
        for row in batch:
            self._remove(row)
        if head.waiting:
            self._enqueue(head, now)
        return batch

    def _enqueue(self, request: RequestT, turn: float) -> None:
        heapq.heappush(self._turns, (turn, next(self._order), request))

    def _next_turn(self) -> RequestT | None:
        while self._turns:
            request = heapq.heappop(self._turns)[2]
            if request.waiting:
                return request
        return None

    def _neighbours(self, first: Row[RequestT]) -> Iterator[Row[RequestT]]:
        limits = self._limits
        index = self._by_length[first.request.key]
        shorter, longer = index.downwards(first), index.upwards(first)
        below, above = next(shorter, None), next(longer, None)
        count, real, longest = 1, first.length, first.length
        yield first
        while count < limits.max_rows and (below or above):
            fill_below = (real + below.length) / ((count + 1) * longest) if below else 0.0
            fill_above = (real + above.length) / ((count + 1) * above.length) if above else 0.0
            if above and fill_above > fill_below:
                row, fill, candidates = above, fill_above, longer
            elif below:
                row, fill, candidates = below, fill_below, shorter
            padded = (count + 1) * max(longest, row.length)
            fits = padded <= limits.max_tokens and (fill >= limits.min_fill or padded <= limits.free_tokens)
            if fits:
                count, real, longest = count + 1, real + row.length, max(longest, row.length)
                yield row
            # What lies farther off in the same direction fits no better.
            following = next(candidates, None) if fits else None
            if candidates is longer:
                above = following
            else:
                below = following

    def _remove(self, row: Row[RequestT]) -> None:
        request = row.request
        del request.waiting[row.index]
        if not request.waiting:
            del self._requests[request]
        index = self._by_length[request.key]
        index.remove(row)
        if not index:
            del self._by_length[request.key]
        self.rows -= 1
        self.tokens -= row.length


class _LengthIndex(Generic[RequestT]):
    """Waiting rows by length, oldest first within a length."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._rows: dict[int, dict[Row[RequestT], None]] = {}

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def add(self, row: Row[RequestT]) -> None:
        if row.length not in self._rows:
            self._rows[row.length] = {}
            insort(self._lengths, row.length)
        self._rows[row.length][row] = None

    def remove(self, row: Row[RequestT]) -> None:
        rows = self._rows[row.length]
        del rows[row]
        if not rows:
            del self._rows[row.length]
            del self._lengths[bisect_left(self._lengths, row.length)]

    def downwards(self, first: Row[RequestT]) -> Iterator[Row[RequestT]]:
        """Rows as long as `first` or shorter, nearest first, without `first`."""
        for position in range(bisect_left(self._lengths, first.length), -1, -1):
            yield from (row for row in self._rows[self._lengths[position]] if row is not first)

    def upwards(self, first: Row[RequestT]) -> Iterator[Row[RequestT]]:
        """Rows longer than `first`, nearest first."""
        for position in range(bisect_left(self._lengths, first.length) + 1, len(self._lengths)):
            yield from self._rows[self._lengths[position]]
