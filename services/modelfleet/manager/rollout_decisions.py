"""What a rollout does next, given what workers report: a pure function, so that any manager decides the same."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from modelfleet.manager.canary import Canary, since, total
from modelfleet.manager.placement import serves
from modelfleet.manager.rollout_states import HOLDING_BOTH, RolloutState
from modelfleet.manager.workers import Traffic, VersionState, WorkerStatus

_NAMED_IN_REASONS = 5
_GONE = frozenset({VersionState.UNLOADED, VersionState.FAILED})

Baseline = Mapping[tuple[str, int], Traffic]
"""What a worker had answered with a version when a step of the canary began, by worker and version."""


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """What is to be done; times in seconds."""

    model: str
    alias: str
    model_version: int
    loading_timeout_s: float = 600.0
    canary: Canary | None = None
    rollback_window_s: float = 10.0


@dataclass(frozen=True, slots=True)
class RolloutEvent:
    """A state that was entered, or a step of the canary; the percent of requests for the new version from then on."""

    state: RolloutState
    percent: int
    reason: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Rollout:
    """
    A rollout. `old_model_version` is 0 where the alias named nothing. `step` is the canary's, counted from 0.

    `revision` is that of the assignment since the last event: what workers reported under an older one is out of date.
    `pools` are those that serve the model, none for all.
    """

    rollout: int
    spec: RolloutSpec
    old_model_version: int
    state: RolloutState
    step: int
    revision: int
    baseline: Baseline
    events: tuple[RolloutEvent, ...]
    pools: tuple[str, ...] = ()

    def concerned(self, workers: Iterable[WorkerStatus]) -> tuple[WorkerStatus, ...]:
        """Return the workers that serve the model."""
        return tuple(worker for worker in workers if serves(worker.pool, self.pools))

    def current(self, worker: WorkerStatus) -> bool:
        """Return whether a worker's report is of the present state."""
        return worker.revision >= self.revision


@dataclass(frozen=True, slots=True)
class Figures:
    """What the two versions did in the current step of the canary."""

    old: Traffic
    new: Traffic


@dataclass(frozen=True, slots=True)
class Next:
    """The state to enter, why, and the step of the canary."""

    state: RolloutState
    reason: str = ""
    step: int = 0


def decide(rollout: Rollout, workers: Sequence[WorkerStatus], elapsed_s: float, *, old_is_named: bool) -> Next | None:
    """
    Return what is to be entered now, None to wait.

    `workers` are all live ones; `elapsed_s` is the time since the last event, in seconds; `old_is_named` tells that
    something else assigns the old version.
    """
    workers = rollout.concerned(workers)
    if rollout.state in HOLDING_BOTH and (reason := _failure(rollout, workers)):
        return Next(RolloutState.FAILED, reason)
    following: Next | None = None
    match rollout.state:
        case RolloutState.PENDING:
            following = Next(RolloutState.LOADING)
        case RolloutState.LOADING:
            following = _after_loading(rollout, workers, elapsed_s)
        case RolloutState.CANARY:
            following = _after_step(rollout, workers, elapsed_s)
        case RolloutState.FLIPPING:
            # Without any worker, it may be the new version that has taken them all with it.
            followed = workers and all(rollout.current(worker) for worker in workers)
            if followed and elapsed_s >= rollout.spec.rollback_window_s:
                following = Next(RolloutState.DRAINING)
        case RolloutState.DRAINING:
            if old_is_named or not any(_may_hold_old(rollout, worker) for worker in workers):
                following = Next(RolloutState.SUCCEEDED)
    return following


def promoted(rollout: Rollout, *, full: bool) -> Next:
    """Return what follows the current step of the canary."""
    assert rollout.spec.canary
    step = rollout.step + 1
    more = step < len(rollout.spec.canary.percents) and not full
    return Next(RolloutState.CANARY, step=step) if more else Next(RolloutState.FLIPPING)


def not_ready(rollout: Rollout, workers: Iterable[WorkerStatus]) -> list[str]:
    """Return the workers that would not answer with the new version, each with the state that it is in there."""
    waiting = []
    for worker in workers:
        status = worker.version(rollout.spec.model, rollout.spec.model_version)
        # A READY from before the rollout may be of a session that is on its way out; a canary begins without such.
        counts = rollout.current(worker) or rollout.state is RolloutState.CANARY
        if status is None or status.state is not VersionState.READY or not counts:
            waiting.append(f"{worker.worker} ({status.state.value if status else 'not started'})")
    return waiting


def figures(rollout: Rollout, workers: Iterable[WorkerStatus]) -> Figures:
    """Return what each version did on all workers since the current step of the canary began."""
    seen = traffic(rollout.spec.model, (rollout.old_model_version, rollout.spec.model_version), workers)

    def summed(model_version: int) -> Traffic:
        return total(
            since(now, rollout.baseline.get((worker, number), Traffic()))
            for (worker, number), now in seen.items()
            if number == model_version
        )

    return Figures(summed(rollout.old_model_version), summed(rollout.spec.model_version))


def traffic(model: str, model_versions: Sequence[int], workers: Iterable[WorkerStatus]) -> Baseline:
    """Return what each worker says that some versions of a model have answered."""
    return {
        (worker.worker, status.model_version): status.traffic
        for worker in workers
        for status in worker.versions
        if status.model == model and status.model_version in model_versions
    }


def _failure(rollout: Rollout, workers: Iterable[WorkerStatus]) -> str:
    for worker in workers:
        status = worker.version(rollout.spec.model, rollout.spec.model_version)
        if status and status.state is VersionState.FAILED and rollout.current(worker):
            named = f"{rollout.spec.model}@{rollout.spec.model_version}"
            return f"{named} failed on worker {worker.worker}: {status.reason or 'it gave no reason'}"
    return ""


def _after_loading(rollout: Rollout, workers: Sequence[WorkerStatus], elapsed_s: float) -> Next | None:
    waiting = not_ready(rollout, workers)
    # Without any worker, nothing has shown that the version can be loaded.
    if workers and not waiting:
        return Next(RolloutState.CANARY if rollout.spec.canary else RolloutState.FLIPPING)
    if elapsed_s < rollout.spec.loading_timeout_s:
        return None
    more = [f"and {len(waiting) - _NAMED_IN_REASONS} more"] if len(waiting) > _NAMED_IN_REASONS else []
    who = ", ".join(waiting[:_NAMED_IN_REASONS] + more)
    what = f"Not loaded by {who}" if workers else "No worker reported"
    return Next(RolloutState.FAILED, f"{what} within {rollout.spec.loading_timeout_s:g} s.")


def _after_step(rollout: Rollout, workers: Sequence[WorkerStatus], elapsed_s: float) -> Next | None:
    canary = rollout.spec.canary
    assert canary
    seen = figures(rollout, workers)
    if reason := canary.verdict(seen.old, seen.new):
        return Next(RolloutState.FAILED, reason)
    ends = 0 < canary.step_duration_s <= elapsed_s and canary.suffices(seen.new)
    # A worker that has joined meanwhile may still be loading; for none at all, see `decide`.
    return promoted(rollout, full=False) if ends and workers and not not_ready(rollout, workers) else None


def _may_hold_old(rollout: Rollout, worker: WorkerStatus) -> bool:
    status = worker.version(rollout.spec.model, rollout.old_model_version)
    return not rollout.current(worker) or (status is not None and status.state not in _GONE)
