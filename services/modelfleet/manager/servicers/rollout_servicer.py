"""RolloutService: messages in, messages out."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from modelfleet.api.manager.v1 import rollout_service_pb2 as pb
from modelfleet.api.manager.v1.rollout_service_pb2_grpc import RolloutServiceServicer
from modelfleet.api.manager.v1.version_state_pb2 import VersionState as VersionStateMessage
from modelfleet.manager.canary import Canary, p99_s
from modelfleet.manager.rollout_decisions import Rollout, RolloutEvent, RolloutSpec
from modelfleet.manager.rollout_states import RolloutState
from modelfleet.manager.rollouts import RolloutReport, Rollouts
from modelfleet.manager.workers import Traffic, WorkerStatus
from modelfleet.runtime.paging import PageRequest

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_DEFAULT_MIN_REQUESTS = 100


class RolloutServicer(RolloutServiceServicer):
    """Rollouts over gRPC. They block, so they are called in threads."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    async def CreateRollout(self, request: pb.CreateRolloutRequest, context: Context) -> pb.CreateRolloutResponse:
        del context
        report = await asyncio.to_thread(self._rollouts.create, _spec(request.spec))
        return pb.CreateRolloutResponse(rollout=_rollout_message(report))

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.GetRolloutResponse:
        del context
        report = await asyncio.to_thread(self._rollouts.get, request.rollout)
        return pb.GetRolloutResponse(rollout=_rollout_message(report))

    async def ListRollouts(self, request: pb.ListRolloutsRequest, context: Context) -> pb.ListRolloutsResponse:
        del context
        page = PageRequest(request.page_size, request.page_token)
        found = await asyncio.to_thread(self._rollouts.page, request.model, request.alias, page)
        return pb.ListRolloutsResponse(
            rollouts=[_rollout_message(report) for report in found.items], next_page_token=found.next_token
        )

    async def PromoteRollout(self, request: pb.PromoteRolloutRequest, context: Context) -> pb.PromoteRolloutResponse:
        del context
        report = await asyncio.to_thread(self._rollouts.promote, request.rollout, full=request.full)
        return pb.PromoteRolloutResponse(rollout=_rollout_message(report))

    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Context) -> pb.AbortRolloutResponse:
        del context
        report = await asyncio.to_thread(self._rollouts.abort, request.rollout, request.reason)
        return pb.AbortRolloutResponse(rollout=_rollout_message(report))


def _spec(message: pb.RolloutSpec) -> RolloutSpec:
    given = {
        f"{field}_s": _seconds(getattr(message, field))
        for field in ("loading_timeout", "rollback_window")
        if message.HasField(field)
    }
    canary = _canary(message.canary) if message.HasField("canary") else None
    return RolloutSpec(message.model, message.alias, message.model_version, canary=canary, **given)


def _canary(message: pb.Canary) -> Canary:
    return Canary(
        percents=tuple(message.percents),
        step_duration_s=_seconds(message.step_duration),
        min_requests=message.min_requests or _DEFAULT_MIN_REQUESTS,
        max_error_rate=message.max_error_rate if message.HasField("max_error_rate") else None,
        max_p99_s=_seconds(message.max_p99) if message.HasField("max_p99") else None,
        max_p99_ratio=message.max_p99_ratio if message.HasField("max_p99_ratio") else None,
    )


def _rollout_message(report: RolloutReport) -> pb.Rollout:
    rollout, figures = report.rollout, report.figures
    return pb.Rollout(
        rollout=rollout.rollout,
        spec=_spec_message(rollout.spec),
        old_model_version=rollout.old_model_version,
        state=_state(rollout.state),
        reason=rollout.events[-1].reason,
        percent=rollout.events[-1].percent,
        workers=[_worker_message(rollout, worker) for worker in report.workers],
        old_figures=_figures_message(figures.old) if figures else None,
        new_figures=_figures_message(figures.new) if figures else None,
        create_time=_event_message(rollout.events[0]).time,
        events=[_event_message(event) for event in rollout.events],
    )


def _spec_message(spec: RolloutSpec) -> pb.RolloutSpec:
    return pb.RolloutSpec(
        model=spec.model,
        alias=spec.alias,
        model_version=spec.model_version,
        loading_timeout=_duration(spec.loading_timeout_s),
        rollback_window=_duration(spec.rollback_window_s),
        canary=_canary_message(spec.canary) if spec.canary else None,
    )


def _canary_message(canary: Canary) -> pb.Canary:
    return pb.Canary(
        percents=canary.percents,
        step_duration=_duration(canary.step_duration_s),
        min_requests=canary.min_requests,
        max_error_rate=canary.max_error_rate,
        max_p99=None if canary.max_p99_s is None else _duration(canary.max_p99_s),
        max_p99_ratio=canary.max_p99_ratio,
    )


def _worker_message(rollout: Rollout, worker: WorkerStatus) -> pb.WorkerProgress:
    message = pb.WorkerProgress(worker=worker.worker, pool=worker.pool, current=rollout.current(worker))
    if status := worker.version(rollout.spec.model, rollout.spec.model_version):
        message.state = VersionStateMessage.Value(f"VERSION_STATE_{status.state.value}")
        message.reason = status.reason
    return message


def _figures_message(traffic: Traffic) -> pb.VersionFigures:
    p99 = p99_s(traffic)
    return pb.VersionFigures(
        request_count=traffic.request_count,
        failure_count=traffic.failure_count,
        p99=None if p99 is None else _duration(p99),
    )


def _event_message(event: RolloutEvent) -> pb.RolloutEvent:
    time = Timestamp()
    time.FromDatetime(event.time)
    return pb.RolloutEvent(state=_state(event.state), time=time, reason=event.reason, percent=event.percent)


def _state(state: RolloutState) -> pb.RolloutState.ValueType:
    return pb.RolloutState.Value(f"ROLLOUT_STATE_{state.value}")


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))
