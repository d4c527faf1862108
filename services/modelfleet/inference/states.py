"""The states of a model version on a worker, and which may follow which. Nothing else writes them."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class VersionState(StrEnum):
    """Where a model version is in its life on this worker."""

    DOWNLOADING = "DOWNLOADING"
    VERIFYING = "VERIFYING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


_D, _V, _W = VersionState.DOWNLOADING, VersionState.VERIFYING, VersionState.WARMING
_R, _G, _U, _F = VersionState.READY, VersionState.DRAINING, VersionState.UNLOADED, VersionState.FAILED

FOLLOWING: Mapping[VersionState, frozenset[VersionState]] = MappingProxyType(
    {
        _D: frozenset({_D, _V, _F, _U}),  # itself: the manager is away; unloaded: unassigned before it was ready
        _V: frozenset({_V, _W, _F, _U}),  # itself, as warming does: another has made way, and it is loaded anew
        _W: frozenset({_V, _R, _F, _U}),
        _R: frozenset({_G, _F}),  # failed: evicted, and could not be loaded again
        _G: frozenset({_U}),
        _U: frozenset({_D}),
        _F: frozenset({_D, _U}),  # tried again, or no longer assigned
    }
)


def follows(before: VersionState, after: VersionState) -> VersionState:
    """Return `after`; raises AssertionError where it may not follow `before`."""
    assert after in FOLLOWING[before], f"{after} cannot follow {before}"
    return after
