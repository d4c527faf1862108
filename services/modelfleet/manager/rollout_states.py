"""The states of a rollout, and which may follow which. Nothing else writes them."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class RolloutState(StrEnum):
    """Where a rollout is."""

    PENDING = "PENDING"
    LOADING = "LOADING"
    CANARY = "CANARY"
    FLIPPING = "FLIPPING"
    DRAINING = "DRAINING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"


_P, _L, _C, _F = RolloutState.PENDING, RolloutState.LOADING, RolloutState.CANARY, RolloutState.FLIPPING
_D, _S, _X, _A = RolloutState.DRAINING, RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.ABORTED

FOLLOWING: Mapping[RolloutState, frozenset[RolloutState]] = MappingProxyType(
    {
        _P: frozenset({_L, _X, _A}),
        _L: frozenset({_C, _F, _X, _A}),
        _C: frozenset({_C, _F, _X, _A}),  # itself: the next step
        _F: frozenset({_D, _X, _A}),  # the latter two move the alias back
        _D: frozenset({_S}),
        _S: frozenset(),
        _X: frozenset(),
        _A: frozenset(),
    }
)

UNDECIDED = frozenset({_P, _L, _C, _F})
"""The alias belongs to the rollout, which may still end with the alias where it was."""
HOLDING_BOTH = frozenset({_L, _C, _F})
"""Both versions are assigned, wherever the alias points."""
OPEN = UNDECIDED | {_D}
"""The rollout is not over."""


def follows(before: RolloutState, after: RolloutState) -> RolloutState:
    """Return `after`; raises AssertionError where it may not follow `before`."""
    assert after in FOLLOWING[before], f"{after} cannot follow {before}"
    return after
