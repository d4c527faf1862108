"""PoolService: messages in, messages out."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from modelfleet.api.manager.v1 import pool_service_pb2 as pb
from modelfleet.api.manager.v1.pool_service_pb2_grpc import PoolServiceServicer
from modelfleet.api.manager.v1.version_state_pb2 import VersionState as VersionStateMessage
from modelfleet.api.manager.v1.worker_service_pb2 import VersionStatus as VersionStatusMessage
from modelfleet.manager.pools.pool import Pool, Pools, PoolWorker, find_pool
from modelfleet.manager.workers import VersionStatus, Workers
from modelfleet.runtime.paging import Page, PageRequest

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Reported: TypeAlias = dict[str, tuple[VersionStatus, ...]]

_LISTING = "pools"


class PoolServicer(PoolServiceServicer):
    """Pools over gRPC, each worker with the versions that it reports."""

    def __init__(self, pools: Pools, workers: Workers) -> None:
        self._pools = pools
        self._workers = workers

    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        del context
        wanted = PageRequest(request.page_size, request.page_token)
        after = wanted.after(_LISTING) or ""
        rest = [pool for pool in await self._pools.list() if pool.pool > after]
        page = Page.cut(rest[: wanted.limit + 1], wanted.limit, _LISTING, lambda pool: pool.pool)
        reported = await self._reported()
        return pb.ListPoolsResponse(
            pools=[_pool_message(pool, reported) for pool in page.items], next_page_token=page.next_token
        )

    async def GetPool(self, request: pb.GetPoolRequest, context: Context) -> pb.GetPoolResponse:
        del context
        pool = find_pool(await self._pools.list(), request.pool)
        return pb.GetPoolResponse(pool=_pool_message(pool, await self._reported()))

    async def ScalePool(self, request: pb.ScalePoolRequest, context: Context) -> pb.ScalePoolResponse:
        del context
        pool = await self._pools.scale(request.pool, request.replicas)
        return pb.ScalePoolResponse(pool=_pool_message(pool, await self._reported()))

    async def _reported(self) -> Reported:
        return {status.worker: status.versions for status in await asyncio.to_thread(self._workers.current)}


def _pool_message(pool: Pool, reported: Reported) -> pb.Pool:
    observed = Timestamp()
    observed.FromDatetime(pool.observe_time)
    return pb.Pool(
        pool=pool.pool,
        desired_replicas=pool.desired_replicas,
        ready_replicas=pool.ready_replicas,
        gpu_resource=pool.gpu_resource,
        gpus_per_worker=pool.gpus_per_worker,
        images=pool.images,
        problem=pool.problem,
        workers=[_worker_message(worker, reported.get(worker.worker, ())) for worker in pool.workers],
        observe_time=observed,
    )


def _worker_message(worker: PoolWorker, versions: tuple[VersionStatus, ...]) -> pb.PoolWorker:
    return pb.PoolWorker(
        worker=worker.worker,
        node=worker.node,
        ready=worker.ready,
        image=worker.image,
        problem=worker.problem,
        restart_count=worker.restart_count,
        versions=[
            VersionStatusMessage(
                model=version.model,
                model_version=version.model_version,
                state=VersionStateMessage.Value(f"VERSION_STATE_{version.state}"),
                reason=version.reason,
                providers=version.providers,
            )
            for version in sorted(versions, key=lambda version: (version.model, version.model_version))
        ],
    )
