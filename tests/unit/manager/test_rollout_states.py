import pytest
from modelfleet.api.manager.v1 import rollout_service_pb2 as pb
from modelfleet.manager.rollout_states import FOLLOWING, HOLDING_BOTH, OPEN, UNDECIDED, RolloutState, follows

TABLE = """
from \\ to   PENDING LOADING CANARY FLIPPING DRAINING SUCCEEDED FAILED ABORTED
PENDING      .       x       .      .        .        .         x      x
LOADING      .       .       x      x        .        .         x      x
CANARY       .       .       x      x        .        .         x      x
FLIPPING     .       .       .      .        x        .         x      x
DRAINING     .       .       .      .        .        x         .      .
SUCCEEDED    .       .       .      .        .        .         .      .
FAILED       .       .       .      .        .        .         .      .
ABORTED      .       .       .      .        .        .         .      .
"""


def table() -> list[tuple[RolloutState, RolloutState, bool]]:
    head, *lines = TABLE.strip().splitlines()
    columns = [RolloutState(name) for name in head.split()[3:]]
    rows = [line.split() for line in lines]
    return [
        (RolloutState(row[0]), after, mark == "x") for row in rows for after, mark in zip(columns, row[1:], strict=True)
    ]


@pytest.mark.parametrize(("before", "after", "may"), table())
def test_what_may_follow_what(before: RolloutState, after: RolloutState, may: bool) -> None:
    if may:
        assert follows(before, after) is after
    else:
        with pytest.raises(AssertionError, match=f"{after} cannot follow {before}"):
            follows(before, after)


def test_the_table_and_the_contract_know_the_same_states() -> None:
    assert set(FOLLOWING) == set(RolloutState)
    assert [f"ROLLOUT_STATE_{state}" for state in RolloutState] == list(pb.RolloutState.keys())[1:]


def test_every_open_state_leads_to_an_end_and_no_end_leads_on() -> None:
    ends = set(RolloutState) - OPEN

    assert all(not FOLLOWING[end] for end in ends)
    for state in OPEN:
        reached, waiting = set(), [state]
        while waiting:
            reached.add(waiting[-1])
            waiting += FOLLOWING[waiting.pop()] - reached
        assert RolloutState.SUCCEEDED in reached


def test_whatever_is_undecided_can_be_stopped_and_nothing_else() -> None:
    for state in RolloutState:
        stoppable = {RolloutState.FAILED, RolloutState.ABORTED} <= FOLLOWING[state]
        assert stoppable == (state in UNDECIDED)
    assert HOLDING_BOTH < UNDECIDED < OPEN
