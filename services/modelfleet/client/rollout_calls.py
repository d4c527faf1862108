"""Calls of the manager about rollouts."""

from collections.abc import Sequence
from datetime import UTC

from google.protobuf.duration_pb2 import Duration

from modelfleet.api.manager.v1 import rollout_service_pb2 as pb
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.bundle.reference import ModelReference
from modelfleet.client.answers import Rollout, RolloutEvent, VersionFigures, WorkerProgress
from modelfleet.client.steps import Method, Procedure, Service, ask
from modelfleet.runtime.errors import InvalidInputError

_PATH = "/modelfleet.api.manager.v1.RolloutService"
CREATE_ROLLOUT = Method(Service.MANAGER, f"{_PATH}/CreateRollout", pb.CreateRolloutResponse)
GET_ROLLOUT = Method(Service.MANAGER, f"{_PATH}/GetRollout", pb.GetRolloutResponse)
LIST_ROLLOUTS = Method(Service.MANAGER, f"{_PATH}/ListRollouts", pb.ListRolloutsResponse)
PROMOTE_ROLLOUT = Method(Service.MANAGER, f"{_PATH}/PromoteRollout", pb.PromoteRolloutResponse)
ABORT_ROLLOUT = Method(Service.MANAGER, f"{_PATH}/AbortRollout", pb.AbortRolloutResponse)


def start_rollout(
    model: str,
    model_version: int,
    *,
    canary_percents: Sequence[int] = (),
    step_duration_s: float = 0,
    min_requests: int = 0,
    max_error_rate: float | None = None,
    max_p99_s: float | None = None,
    max_p99_ratio: float | None = None,
    loading_timeout_s: float | None = None,
    rollback_window_s: float | None = None,
    timeout_s: float | None = None,
) -> Procedure[Rollout]:
    """
    Begin to move an alias, `name@alias` or `name` for its `stable`, to a version on every worker that serves it.

    With `canary_percents`, the new version gets these shares first, one after the other: each for at least
    `step_duration_s`, or until promoted where that is 0. It fails once it has ended `min_requests` (0 for 100) and more
    of them failed than `max_error_rate`, or its p99 is above `max_p99_s` or `max_p99_ratio` times the old version's.
    Left to the manager: 10 minutes for `loading_timeout_s`, 10 s for `rollback_window_s`.
    """
    reference = alias_reference(model)
    limits = any(limit is not None for limit in (max_error_rate, max_p99_s, max_p99_ratio))
    if not canary_percents and (limits or step_duration_s or min_requests):
        raise InvalidInputError(
            "Limits, step_duration_s and min_requests are those of a canary. Give canary_percents too.",
            field="canary_percents",
        )
    canary = pb.Canary(
        percents=canary_percents,
        step_duration=_duration(step_duration_s),
        min_requests=min_requests,
        max_error_rate=max_error_rate,
        max_p99=_duration(max_p99_s),
        max_p99_ratio=max_p99_ratio,
    )
    spec = pb.RolloutSpec(
        model=reference.model,
        alias=reference.alias or "",
        model_version=model_version,
        loading_timeout=_duration(loading_timeout_s),
        canary=canary if canary_percents else None,
        rollback_window=_duration(rollback_window_s),
    )
    response = yield from ask(CREATE_ROLLOUT, pb.CreateRolloutRequest(spec=spec), timeout_s)
    return _rollout(response.rollout)


def get_rollout(rollout: int, *, timeout_s: float | None = None) -> Procedure[Rollout]:
    """Return a rollout as it is now."""
    response = yield from ask(GET_ROLLOUT, pb.GetRolloutRequest(rollout=rollout), timeout_s)
    return _rollout(response.rollout)


def rollouts(model: str = "", *, limit: int = 100, timeout_s: float | None = None) -> Procedure[tuple[Rollout, ...]]:
    """List the newest rollouts, newest first: of all models, of the model `name`, or of the alias `name@alias`."""
    name, _, alias = model.partition("@")
    found: list[Rollout] = []
    token = ""
    while len(found) < limit:
        request = pb.ListRolloutsRequest(model=name, alias=alias, page_size=limit - len(found), page_token=token)
        page = yield from ask(LIST_ROLLOUTS, request, timeout_s)
        found.extend(_rollout(rollout) for rollout in page.rollouts)
        token = page.next_page_token
        if not token:
            break
    return tuple(found)


def promote_rollout(rollout: int, *, full: bool = False, timeout_s: float | None = None) -> Procedure[Rollout]:
    """End the current step of a rollout's canary; `full` skips all further ones too."""
    response = yield from ask(PROMOTE_ROLLOUT, pb.PromoteRolloutRequest(rollout=rollout, full=full), timeout_s)
    return _rollout(response.rollout)


def abort_rollout(rollout: int, reason: str = "", *, timeout_s: float | None = None) -> Procedure[Rollout]:
    """Stop a rollout; its alias names the old version from then on. Raises StateConflictError from DRAINING on."""
    response = yield from ask(ABORT_ROLLOUT, pb.AbortRolloutRequest(rollout=rollout, reason=reason), timeout_s)
    return _rollout(response.rollout)


def alias_reference(text: str) -> ModelReference:
    """Read `name@alias`, or `name` for its `stable`. Raises InvalidInputError for a numbered version."""
    reference = ModelReference.parse(text)
    if reference.alias is None:
        raise InvalidInputError(f"{text!r} names no alias. Write NAME@ALIAS, such as pii@stable.", field="model")
    return reference


def _rollout(message: pb.Rollout) -> Rollout:
    return Rollout(
        rollout=message.rollout,
        model=message.spec.model,
        alias=message.spec.alias,
        model_version=message.spec.model_version,
        old_model_version=message.old_model_version,
        canary_percents=tuple(message.spec.canary.percents),
        state=_state(message.state),
        reason=message.reason,
        percent=message.percent,
        workers=tuple(_worker(worker) for worker in message.workers),
        old_figures=_figures(message.old_figures) if message.HasField("old_figures") else None,
        new_figures=_figures(message.new_figures) if message.HasField("new_figures") else None,
        events=tuple(
            RolloutEvent(_state(event.state), event.percent, event.reason, event.time.ToDatetime(UTC))
            for event in message.events
        ),
        create_time=message.create_time.ToDatetime(UTC),
    )


def _worker(worker: pb.WorkerProgress) -> WorkerProgress:
    state = version_state_pb2.VersionState.Name(worker.state).removeprefix("VERSION_STATE_") if worker.state else ""
    return WorkerProgress(worker.worker, worker.pool, state, worker.reason, worker.current)


def _figures(figures: pb.VersionFigures) -> VersionFigures:
    p99_s = figures.p99.ToNanoseconds() / 1e9 if figures.HasField("p99") else None
    return VersionFigures(figures.request_count, figures.failure_count, p99_s)


def _state(state: pb.RolloutState.ValueType) -> str:
    return pb.RolloutState.Name(state).removeprefix("ROLLOUT_STATE_")


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
