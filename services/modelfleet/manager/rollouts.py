"""Rollouts in the database: created, read, promoted, aborted, and moved from state to state."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from modelfleet.bundle.reference import check_alias_name, check_model_name
from modelfleet.manager.aliases import check_free, next_revision, point
from modelfleet.manager.canary import Canary
from modelfleet.manager.models import existing_version
from modelfleet.manager.placement import pools_of
from modelfleet.manager.rollout_decisions import (
    Baseline,
    Figures,
    Next,
    Rollout,
    RolloutEvent,
    RolloutSpec,
    figures,
    not_ready,
    promoted,
    traffic,
)
from modelfleet.manager.rollout_states import OPEN, UNDECIDED, RolloutState, follows
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AliasRow, RolloutEventRow, RolloutRow
from modelfleet.manager.workers import Traffic, Workers, WorkerStatus
from modelfleet.runtime.errors import InvalidInputError, RolloutNotFoundError, StateConflictError
from modelfleet.runtime.paging import Page, PageRequest

_LONGEST_REASON = 500
_SHORTEST_TIMEOUT_S = 1.0
_UNASSIGNED = frozenset({RolloutState.PENDING, RolloutState.SUCCEEDED})  # entering these tells workers nothing new
_STOPPED = frozenset({RolloutState.FAILED, RolloutState.ABORTED})

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """A rollout, the live workers that serve its model while it is open, and the versions' figures while in CANARY."""

    rollout: Rollout
    workers: tuple[WorkerStatus, ...]
    figures: Figures | None


class Rollouts:
    """
    Reads rollouts and does what people ask of them. Blocking: call it from threads.

    `changed` is called, from whichever thread, after each change of what workers should serve.
    """

    def __init__(self, database: Database, workers: Workers, changed: Callable[[], None]) -> None:
        self._database = database
        self._workers = workers
        self._changed = changed

    def create(self, spec: RolloutSpec) -> RolloutReport:
        """Begin a rollout. Raises InvalidInputError, NotFoundErrors, and StateConflictError where one is under way."""
        check(spec)
        with self._database.writing() as session:
            existing_version(session, spec.model, spec.model_version)
            check_free(session, spec.model, spec.alias)
            alias = session.get(AliasRow, (spec.model, spec.alias))
            _check_old_version(spec, alias.model_version if alias else 0)
            row = RolloutRow(
                rollout=1 + (session.scalar(select(func.max(RolloutRow.rollout))) or 0),
                model=spec.model,
                alias=spec.alias,
                model_version=spec.model_version,
                old_model_version=alias.model_version if alias else 0,
                spec_json=json.dumps(asdict(spec)),
                state=RolloutState.PENDING,
                step=0,
                revision=0,
                baseline_json="[]",
                events=[],
            )
            session.add(row)
            _record(row, Next(RolloutState.PENDING), 0)
            session.flush()
            rollout = to_rollout(row)
        _log.info("rollout created", rollout=rollout.rollout, **asdict(spec))
        self._changed()
        return self._reports([rollout])[0]

    def get(self, number: int) -> RolloutReport:
        """Return a rollout. Raises RolloutNotFoundError."""
        with self._database.reading() as session:
            rollout = to_rollout(_existing(session, number))
        return self._reports([rollout])[0]

    def page(self, model: str, alias: str, page: PageRequest) -> Page[RolloutReport]:
        """Return a page of rollouts, newest first, of one model and of one of its aliases unless these are empty."""
        if alias and not model:
            raise InvalidInputError(f"alias is {alias!r}, but no model is given. Give the model too.", field="model")
        listing = f"rollouts of {model}@{alias}"
        limit, before = page.limit, page.after_number(listing)
        query = select(RolloutRow).order_by(RolloutRow.rollout.desc()).limit(limit + 1)
        if model:
            query = query.filter_by(model=model)
        if alias:
            query = query.filter_by(alias=alias)
        if before is not None:
            query = query.where(RolloutRow.rollout < before)
        with self._database.reading() as session:
            rollouts = [to_rollout(row) for row in session.scalars(query)]
        return Page.cut(self._reports(rollouts), limit, listing, lambda report: report.rollout.rollout)

    def promote(self, number: int, *, full: bool) -> RolloutReport:
        """End the current step of a canary, or all. Raises StateConflictError unless all workers are ready for it."""
        workers = self._workers.current()
        with self._database.writing() as session:
            row = _existing(session, number)
            rollout = to_rollout(row)
            if rollout.state is not RolloutState.CANARY:
                raise StateConflictError(
                    f"Rollout {number} is {rollout.state}, not CANARY: it has no step to end. "
                    "It goes on by itself, or is over."
                )
            concerned = rollout.concerned(workers)
            if not concerned:
                raise StateConflictError(
                    f"Rollout {number} cannot be promoted: no worker reports. Retry when one does, or abort it."
                )
            if waiting := not_ready(rollout, concerned):
                raise StateConflictError(
                    f"Rollout {number} cannot be promoted: {', '.join(waiting)} would not answer. Retry when READY."
                )
            enter(session, row, promoted(rollout, full=full), workers)
            session.flush()
            rollout = to_rollout(row)
        self._changed()
        return self._reports([rollout])[0]

    def abort(self, number: int, reason: str) -> RolloutReport:
        """Stop a rollout; its alias names the old version from then on. Raises StateConflictError from DRAINING on."""
        if len(reason) > _LONGEST_REASON:
            raise InvalidInputError(
                f"reason has {len(reason)} characters. Give at most {_LONGEST_REASON}.", field="reason"
            )
        with self._database.writing() as session:
            row = _existing(session, number)
            if row.state not in UNDECIDED:
                raise StateConflictError(
                    f"Rollout {number} is {row.state} and can no longer be aborted. To go back, start a rollout of "
                    f"{row.model}@{row.alias} to {row.old_model_version or 'another version'}."
                )
            enter(session, row, Next(RolloutState.ABORTED, reason or "Aborted on request."), ())
            session.flush()
            rollout = to_rollout(row)
        self._changed()
        return self._reports([rollout])[0]

    def _reports(self, rollouts: Sequence[Rollout]) -> list[RolloutReport]:
        workers = self._workers.current() if any(rollout.state in OPEN for rollout in rollouts) else ()
        return [
            RolloutReport(
                rollout,
                rollout.concerned(workers) if rollout.state in OPEN else (),
                figures(rollout, workers) if rollout.state is RolloutState.CANARY else None,
            )
            for rollout in rollouts
        ]


def enter(session: Session, row: RolloutRow, following: Next, workers: Sequence[WorkerStatus]) -> None:
    """
    Let a rollout enter a state, with all that this means in the database: where the alias points, and the revision.

    The only place that writes states. `workers` have answered what the next step of a canary does not count.
    """
    before = RolloutState(row.state)
    state = follows(before, following.state)
    row.state, row.step = state, following.step
    if state is RolloutState.FLIPPING:
        point(session, row.model, row.alias, row.model_version)
    elif state in _STOPPED and before is RolloutState.FLIPPING:
        point(session, row.model, row.alias, row.old_model_version)
    elif state is RolloutState.CANARY:
        seen = traffic(row.model, (row.old_model_version, row.model_version), workers)
        row.baseline_json = json.dumps([[worker, number, asdict(now)] for (worker, number), now in seen.items()])
    if state not in _UNASSIGNED:
        row.revision = next_revision(session)
    _record(row, following, _percent(_spec(row), following))


def to_rollout(row: RolloutRow) -> Rollout:
    """Return the rollout of a row."""
    baseline: Baseline = {
        (worker, number): Traffic(**values | {"latency_counts": tuple(values["latency_counts"])})
        for worker, number, values in json.loads(row.baseline_json)
    }
    events = tuple(
        RolloutEvent(RolloutState(event.state), event.percent, event.reason, event.time) for event in row.events
    )
    state = RolloutState(row.state)
    return Rollout(
        *(row.rollout, _spec(row), row.old_model_version, state, row.step, row.revision, baseline, events),
        pools=pools_of(row.owner),
    )


def check(spec: RolloutSpec) -> None:
    """Raise InvalidInputError, naming the field, unless a spec makes sense."""
    check_model_name(spec.model, field="spec.model")
    check_alias_name(spec.alias, field="spec.alias")
    _require(spec.model_version >= 1, "spec.model_version", spec.model_version, "the number of a version, 1 or more")
    _require(
        spec.loading_timeout_s >= _SHORTEST_TIMEOUT_S, "spec.loading_timeout", spec.loading_timeout_s, "1 s or more"
    )
    _require(spec.rollback_window_s >= 0, "spec.rollback_window", spec.rollback_window_s, "0 s or more")
    if canary := spec.canary:
        percents = canary.percents
        rising = all(a < b for a, b in pairwise(percents))
        fits = percents and rising and percents[0] >= 1 and percents[-1] <= 99  # noqa: PLR2004  what is left is the old version's
        _require(bool(fits), "spec.canary.percents", list(percents), "rising percents from 1 to 99, at least one")
        _require(canary.step_duration_s >= 0, "spec.canary.step_duration", canary.step_duration_s, "0 s or more")
        _require(canary.min_requests >= 1, "spec.canary.min_requests", canary.min_requests, "0 for 100, or 1 or more")
        rate = canary.max_error_rate
        _require(rate is None or 0 <= rate <= 1, "spec.canary.max_error_rate", rate, "a share from 0 to 1")
        for field, limit in (("max_p99", canary.max_p99_s), ("max_p99_ratio", canary.max_p99_ratio)):
            fits = limit is None or (limit > 0 and math.isfinite(limit))
            _require(fits, f"spec.canary.{field}", limit, "more than 0")


def _require(fits: bool, field: str, value: object, wanted: str) -> None:
    if not fits:
        raise InvalidInputError(f"{field} is {value}. Give {wanted}.", field=field)


def _check_old_version(spec: RolloutSpec, old_model_version: int) -> None:
    if old_model_version == spec.model_version:
        raise StateConflictError(
            f"{spec.model}@{spec.alias} names version {spec.model_version} already. Roll out another version."
        )
    if spec.canary and not old_model_version:
        raise StateConflictError(
            f"{spec.model}@{spec.alias} names no version yet that a canary could be compared with. "
            "Start the rollout without a canary."
        )


def _existing(session: Session, number: int) -> RolloutRow:
    row = session.get(RolloutRow, number)
    if row is None:
        newest = session.scalar(select(func.max(RolloutRow.rollout)))
        there = f"the newest is {newest}" if newest else "there is none yet"
        raise RolloutNotFoundError(f"There is no rollout {number}; {there}.", field="rollout")
    return row


def _record(row: RolloutRow, following: Next, percent: int) -> None:
    now = datetime.now(UTC)
    row.events.append(
        RolloutEventRow(
            number=len(row.events), state=following.state, percent=percent, reason=following.reason, time=now
        )
    )
    log = _log.warning if following.state is RolloutState.FAILED else _log.info
    log("rollout state", rollout=row.rollout, state=following.state.value, percent=percent, reason=following.reason)


def _percent(spec: RolloutSpec, following: Next) -> int:
    if following.state is RolloutState.CANARY and spec.canary:
        return spec.canary.percents[following.step]
    moved = following.state in (RolloutState.FLIPPING, RolloutState.DRAINING, RolloutState.SUCCEEDED)
    return 100 if moved else 0


def _spec(row: RolloutRow) -> RolloutSpec:
    values = json.loads(row.spec_json)
    canary = values.pop("canary")
    if canary is not None:
        canary = Canary(**canary | {"percents": tuple(canary["percents"])})
    return RolloutSpec(**values, canary=canary)
