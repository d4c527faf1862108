"""A worker without models: it obeys assignments and reports over real gRPC, as fast or as badly as a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from modelfleet.api.manager.v1 import version_state_pb2 as states
from modelfleet.api.manager.v1 import worker_service_pb2 as pb
from modelfleet.api.manager.v1.worker_service_pb2_grpc import WorkerServiceStub
from modelfleet.client.channel import open_async_channel

_RECONNECT_S = 0.05


@dataclass
class ObedientWorker:
    """
    Holds what it is assigned, by number of version, all of the model `pii`.

    Versions in `slow` stay WARMING, those in `failing` are FAILED, those in `lingering` stay DRAINING when they are no
    longer assigned. While `deaf`, it takes no new assignment. A change of these needs `obey()`. It reports what is new,
    and again every `interval_s` seconds where that is set.
    """

    worker: str
    pool: str = "default"
    slow: set[int] = field(default_factory=set)
    failing: set[int] = field(default_factory=set)
    lingering: set[int] = field(default_factory=set)
    traffic: dict[int, pb.Traffic] = field(default_factory=dict)
    deaf: bool = False
    interval_s: float | None = None
    assignment: pb.Assignment = field(default_factory=pb.Assignment)
    routes: list[dict[int, int]] = field(default_factory=list)
    """Each different route of the alias `stable` that it followed: weights by version."""
    _newest: pb.Assignment = field(default_factory=pb.Assignment)
    _versions: dict[int, int] = field(default_factory=dict)
    _due: asyncio.Event = field(default_factory=asyncio.Event)
    _obeyed: asyncio.Event = field(default_factory=asyncio.Event)
    _reported: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def held(self) -> list[int]:
        """The versions that it is assigned, by the assignment that it follows."""
        return [version.model_version for version in self.assignment.model_versions]

    async def until(self, condition: Callable[["ObedientWorker"], bool]) -> None:
        """Return once a condition holds after an assignment was followed."""
        async with asyncio.timeout(10):
            while not condition(self):
                self._obeyed.clear()
                await self._obeyed.wait()

    def obey(self) -> None:
        """Do what the newest assignment says, and report."""
        if not self.deaf:
            self.assignment = self._newest
        assigned = {version.model_version for version in self.assignment.model_versions}
        for number in assigned:
            state = states.VERSION_STATE_WARMING if number in self.slow else states.VERSION_STATE_READY
            self._versions[number] = states.VERSION_STATE_FAILED if number in self.failing else state
        for number in set(self._versions) - assigned:
            self._versions[number] = states.VERSION_STATE_DRAINING
            if number not in self.lingering:
                del self._versions[number]
        for route in self.assignment.routes:
            weights = {target.model_version: target.weight for target in route.targets}
            if route.alias == "stable" and weights not in self.routes[-1:]:
                self.routes.append(weights)
        self._due.set()
        self._obeyed.set()

    @asynccontextmanager
    async def working_for(self, address: str) -> AsyncIterator["ObedientWorker"]:
        """Watch and report until the block ends, whatever becomes of the manager; the block begins after a report."""
        async with open_async_channel(address, attempts=1) as channel:
            stub = WorkerServiceStub(channel)
            tasks = [asyncio.create_task(self._watch(stub)), asyncio.create_task(self._report(stub))]
            try:
                await self._reported.wait()
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    async def _watch(self, stub: WorkerServiceStub) -> None:
        request = pb.WatchAssignmentsRequest(worker=self.worker, pool=self.pool)
        while True:
            try:
                async for response in stub.WatchAssignments(request, wait_for_ready=True):
                    self._newest = response.assignment
                    self.obey()
            except grpc.RpcError:
                await asyncio.sleep(_RECONNECT_S)

    async def _report(self, stub: WorkerServiceStub) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), self.interval_s)
            self._due.clear()
            versions = [
                pb.VersionStatus(
                    model="pii",
                    model_version=number,
                    state=state,
                    reason="made to fail" if state == states.VERSION_STATE_FAILED else "",
                    traffic=self.traffic.get(number),
                )
                for number, state in self._versions.items()
            ]
            request = pb.ReportStatusRequest(
                worker=self.worker, pool=self.pool, revision=self.assignment.revision, versions=versions
            )
            try:
                await stub.ReportStatus(request, timeout=5)
                self._reported.set()
            except grpc.RpcError:
                self._due.set()
                await asyncio.sleep(_RECONNECT_S)
