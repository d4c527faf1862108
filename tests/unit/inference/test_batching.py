import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from modelfleet.inference.batching import URGENCY_HORIZON_S, BatchLimits, BatchQueue, Request, Row

limits = st.builds(
    BatchLimits,
    max_tokens=st.integers(1, 300),
    min_fill=st.floats(0, 1),
    free_tokens=st.integers(0, 100),
)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def request(*lengths: int, arrival: float = 0.0, deadline: float = math.inf, key: object = None) -> Request:
    return Request(lengths=lengths, arrival=arrival, deadline=deadline, key=key)


def all_batches(queue: BatchQueue[Request]) -> list[list[Row[Request]]]:
    return list(iter(lambda: queue.take_batch(0.0), []))


def row_lengths(batches: Sequence[Sequence[Row[Request]]]) -> list[list[int]]:
    return [[row.length for row in batch] for batch in batches]


class Conservation(RuleBasedStateMachine):
    """Rows come and go in any order, and the queue is compared with what it must hold."""

    @initialize(limits=limits)
    def start(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.queue: BatchQueue[Request] = BatchQueue(limits)
        self.now = 0.0
        self.waiting: set[tuple[Request, int]] = set()
        self.since: dict[Request, float] = {}  # arrival, then the last turn

    @rule(lengths=lengths, patience=st.sampled_from([0.1, 0.9, 5.0, math.inf]), key=st.sampled_from(["a", "b"]))
    def put(self, lengths: list[int], patience: float, key: str) -> None:
        new = request(*lengths, arrival=self.now, deadline=self.now + patience, key=key)
        self.queue.put(new)
        self.waiting |= {(new, index) for index in range(len(lengths))}
        self.since[new] = self.now

    @rule(passed=st.floats(0, 2))
    def time_passes(self, passed: float) -> None:
        self.now += passed

    @rule()
    def take_batch(self) -> None:
        expired = self.queue.take_expired(self.now)
        due = {waiting for waiting, _ in self.waiting if waiting.deadline <= self.now}
        assert set(expired) == due
        assert len(expired) == len(due)
        self.forget(*expired)

        batch = self.queue.take_batch(self.now)

        taken = {(row.request, row.index) for row in batch}
        assert len(taken) == len(batch)
        assert taken <= self.waiting
        assert batch or not self.waiting
        if batch:
            self.check_limits(batch)
            self.check_turn(batch[0].request)
            self.since[batch[0].request] = self.now
        self.waiting -= taken

    def check_limits(self, batch: Sequence[Row[Request]]) -> None:
        padded = len(batch) * max(row.length for row in batch)
        fill = sum(row.length for row in batch) / padded
        assert padded <= self.limits.max_tokens or len(batch) == 1
        assert fill >= self.limits.min_fill or padded <= self.limits.free_tokens or len(batch) == 1
        assert len({row.request.key for row in batch}) == 1

    def check_turn(self, head: Request) -> None:
        """Nobody is passed over by those who came, or had their last turn, more than the horizon later."""
        oldest = min(self.since[waiting] for waiting, _ in self.waiting)
        assert self.since[head] <= oldest + URGENCY_HORIZON_S

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        waiting = {waiting for waiting, _ in self.waiting}
        gone = data.draw(st.sampled_from([one for one in self.since if one in waiting]))
        self.queue.discard(gone)
        self.forget(gone)

    def forget(self, *gone: Request) -> None:
        self.waiting = {(waiting, index) for waiting, index in self.waiting if waiting not in gone}

    @invariant()
    def counts_what_waits(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.rows == len(self.waiting)
            assert self.queue.tokens == sum(waiting.lengths[index] for waiting, index in self.waiting)
            assert set(self.queue.requests()) == {waiting for waiting, _ in self.waiting}

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            while self.waiting:
                self.take_batch()
            assert (self.queue.rows, self.queue.tokens, self.queue.requests()) == (0, 0, [])


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(lengths, min_size=1, max_size=10), limits)
def test_every_row_is_taken_exactly_once(requests: list[list[int]], limits: BatchLimits) -> None:
    queue: BatchQueue[Request] = BatchQueue(limits)
    put = [request(*lengths) for lengths in requests]
    for one in put:
        queue.put(one)
    taken = [(row.request, row.index, row.length) for batch in all_batches(queue) for row in batch]
    assert len(taken) == len(set(taken))
    assert set(taken) == {(one, index, length) for one in put for index, length in enumerate(one.lengths)}
    assert (queue.rows, queue.tokens) == (0, 0)


def test_rows_run_with_those_of_similar_length() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1000))
    queue.put(request(10, 100, 11, 99, 10))
    assert row_lengths(all_batches(queue)) == [[10, 10, 11], [100, 99]]


def test_a_batch_is_filled_from_other_requests() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=30))
    for _ in range(4):
        queue.put(request(10))
    assert row_lengths(all_batches(queue)) == [[10, 10, 10], [10]]


def test_padding_that_costs_nothing_is_allowed() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1000, min_fill=0.9, free_tokens=40))
    queue.put(request(20, 2, 100))
    assert row_lengths(all_batches(queue)) == [[20, 2], [100]]


def test_a_row_longer_than_the_budget_runs_alone() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=10, min_fill=0.0))
    queue.put(request(50, 1))
    assert row_lengths(all_batches(queue)) == [[50], [1]]


def test_the_oldest_request_goes_first() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1))
    younger, older = request(1, arrival=2.0), request(1, arrival=1.0)
    queue.put(younger)
    queue.put(older)
    assert [row.request for batch in all_batches(queue) for row in batch] == [older, younger]


def test_a_near_deadline_goes_before_age() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1))
    older, urgent = request(1, arrival=9.5), request(1, arrival=10.0, deadline=10.1)
    queue.put(older)
    queue.put(urgent)
    assert queue.take_batch(10.0)[0].request is urgent


def test_a_request_with_many_rows_takes_turns_with_small_ones() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1))
    large, small = request(1, 1, 1, arrival=0.0), request(1, arrival=0.1)
    queue.put(large)
    queue.put(small)
    turns = [queue.take_batch(now)[0].request for now in (1.0, 2.0, 3.0, 4.0)]
    assert turns == [large, small, large, large]


def test_a_near_deadline_hastens_one_turn_and_not_all_that_follow() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1))
    large, small = request(1, 1, 1, arrival=10.0, deadline=10.5), request(1, arrival=10.1)
    queue.put(large)
    queue.put(small)
    turns = [queue.take_batch(now)[0].request for now in (10.2, 10.3, 10.4)]
    assert turns == [large, small, large]


def test_the_first_rows_of_a_request_run_first() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=2))
    queue.put(request(*[1] * 6))
    assert [row.index for batch in all_batches(queue) for row in batch] == [0, 1, 2, 3, 4, 5]


def test_an_expired_request_is_dropped_whole_and_once() -> None:
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=1))
    expiring, staying = request(1, 1, deadline=5.0), request(1, deadline=6.0)
    queue.put(expiring)
    queue.put(staying)
    assert queue.take_expired(4.9) == []
    assert queue.take_expired(5.0) == [expiring]
    assert queue.take_expired(5.0) == []
    assert [row.request for batch in all_batches(queue) for row in batch] == [staying]


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_what_has_no_tokens_cannot_wait(lengths: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        BatchQueue(BatchLimits(max_tokens=1)).put(request(*lengths))


def test_nobody_starves_while_urgent_and_large_requests_keep_coming() -> None:
    """A simulated device at 90% load: 1000 tokens a second, in batches of 20."""
    queue: BatchQueue[Request] = BatchQueue(BatchLimits(max_tokens=20, min_fill=0.0))
    large = request(*[10] * 200, arrival=0.0)  # 2 s of work
    queue.put(large)
    now, arrived, ended, starved = 0.0, 0.0, {}, []
    while now < 60:
        while arrived <= now:
            arrived += 0.1
            queue.put(request(*[10] * 6, arrival=arrived, deadline=arrived + 0.3))  # urgent
            queue.put(request(10, arrival=arrived))  # patient
            queue.put(request(*[10] * 2, arrival=arrived))
        starved += queue.take_expired(now)
        batch = queue.take_batch(now)
        now += 0.02 * bool(batch) or 0.001
        for row in batch:
            if not row.request.waiting:
                ended[row.request] = now
    waits = [end - one.arrival for one, end in ended.items() if one is not large]
    assert ended[large] < 30
    assert max(waits) < URGENCY_HORIZON_S + 2
    assert not [one for one in queue.requests() if now - one.arrival > URGENCY_HORIZON_S + 2]
