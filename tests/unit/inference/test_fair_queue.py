from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from modelfleet.inference.generation.fair_queue import FairQueue


@dataclass(eq=False)
class One:
    client: str
    cost: int


def take(queue: FairQueue[One]) -> One:
    head = queue.heads()[0]
    queue.take(head)
    return head


def test_a_client_with_many_requests_does_not_hold_up_one_with_few() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(10):
        queue.put(One("greedy", 100))
    for _ in range(3):
        take(queue)
    queue.put(One("modest", 100))

    assert [take(queue).client for _ in range(3)][:2].count("modest") == 1


def test_turns_are_by_tokens_and_not_by_requests() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(12):
        queue.put(One("long", 100))
        queue.put(One("short", 10))

    order = [take(queue).client for _ in range(13)]

    assert 10 <= order.count("short") <= 12


def test_who_was_away_cannot_have_saved_up() -> None:
    queue: FairQueue[One] = FairQueue()
    for _ in range(20):
        queue.put(One("busy", 10))
    for _ in range(10):
        take(queue)
    for _ in range(10):
        queue.put(One("late", 10))

    assert {take(queue).client for _ in range(3)} == {"busy", "late"}


commands = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=40)


@given(commands, st.lists(st.integers(0, 39), max_size=10))
def test_each_client_is_served_in_order_and_nothing_is_lost(wanted: list[tuple[str, int]], dropped: list[int]) -> None:
    queue: FairQueue[One] = FairQueue()
    put = [One(*one) for one in wanted]
    for one in put:
        queue.put(one)
    left = {one for index, one in enumerate(put) if index not in dropped}
    for one in set(put) - left:
        queue.drop(one)

    assert queue.tokens == sum(one.cost for one in left)
    taken = [take(queue) for _ in range(len(queue))]
    assert set(taken) == left
    for client in "abc":
        assert [one for one in taken if one.client == client] == [
            one for one in put if one.client == client and one in left
        ]
    assert queue.tokens == len(queue) == 0


@given(st.lists(st.integers(1, 50), min_size=20, max_size=60))
def test_clients_that_always_wait_get_equal_shares(costs: list[int]) -> None:
    queue: FairQueue[One] = FairQueue()
    given_tokens = {"a": 0, "b": 0}
    for client in given_tokens:
        queue.put(One(client, costs[0]))
    for cost in costs:
        one = take(queue)
        given_tokens[one.client] += one.cost
        queue.put(One(one.client, cost))

    assert abs(given_tokens["a"] - given_tokens["b"]) <= 2 * max(costs)
