"""WorkerService: messages in, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from modelfleet.api.manager.v1 import worker_service_pb2 as pb
from modelfleet.api.manager.v1.version_state_pb2 import VersionState as VersionStateMessage
from modelfleet.api.manager.v1.worker_service_pb2_grpc import WorkerServiceServicer
from modelfleet.manager.assignments import Assignment, Assignments
from modelfleet.manager.servicers.messages import model_version_message
from modelfleet.manager.workers import SessionMemory, Traffic, VersionState, VersionStatus, Workers, WorkerStatus
from modelfleet.runtime.errors import InvalidInputError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class WorkerServicer(WorkerServiceServicer):
    """Assignments and workers over gRPC."""

    def __init__(self, assignments: Assignments, workers: Workers) -> None:
        self._assignments = assignments
        self._workers = workers
        self._newest: Assignment | None = None
        self._made: dict[str, pb.WatchAssignmentsResponse] = {}  # of the newest, by pool

    async def WatchAssignments(
        self, request: pb.WatchAssignmentsRequest, context: Context
    ) -> AsyncIterator[pb.WatchAssignmentsResponse]:
        del context
        with self._workers.watching(request.worker, request.pool):
            async with aclosing(self._assignments.watch()) as snapshots:
                async for assignment in snapshots:
                    yield self._message(assignment, request.pool)

    def _message(self, assignment: Assignment, pool: str) -> pb.WatchAssignmentsResponse:
        # Once for all workers of a pool: 200 versions take 12 ms, in which nobody else is answered.
        if self._newest is not assignment:
            self._newest, self._made = assignment, {}
        if pool not in self._made:
            own = assignment.of(pool) if pool else assignment
            self._made[pool] = pb.WatchAssignmentsResponse(assignment=_assignment_message(own))
        return self._made[pool]

    async def ReportStatus(self, request: pb.ReportStatusRequest, context: Context) -> pb.ReportStatusResponse:
        del context
        versions = tuple(_version_status(version) for version in request.versions)
        status = WorkerStatus(request.worker, request.pool, request.revision, versions)
        await asyncio.to_thread(self._workers.report, status)
        return pb.ReportStatusResponse()


def _assignment_message(assignment: Assignment) -> pb.Assignment:
    return pb.Assignment(
        revision=assignment.revision,
        model_versions=[model_version_message(version) for version in assignment.model_versions],
        routes=[
            pb.AliasRoute(
                model=route.model,
                alias=route.alias,
                targets=[
                    pb.WeightedVersion(model_version=target.model_version, weight=target.weight)
                    for target in route.targets
                ],
            )
            for route in assignment.routes
        ],
    )


def _version_status(version: pb.VersionStatus) -> VersionStatus:
    memory, traffic = version.memory, version.traffic
    return VersionStatus(
        version.model,
        version.model_version,
        _state(version),
        version.reason,
        tuple(version.providers),
        SessionMemory(memory.host_bytes, memory.host_peak_bytes, memory.device_bytes, memory.device_peak_bytes),
        Traffic(traffic.request_count, traffic.failure_count, tuple(traffic.latency_counts)),
    )


def _state(version: pb.VersionStatus) -> VersionState:
    try:
        return VersionState(VersionStateMessage.Name(version.state).removeprefix("VERSION_STATE_"))
    except ValueError:
        raise InvalidInputError(
            f"The state of {version.model}@{version.model_version} is {version.state}. "
            f"Report one of {', '.join(VersionState)}.",
            field="versions.state",
        ) from None
