"""Calls of the manager about pools."""

from datetime import UTC

from modelfleet.api.manager.v1 import pool_service_pb2 as pb
from modelfleet.api.manager.v1.version_state_pb2 import VersionState
from modelfleet.client.answers import Pool, PoolWorker, WorkerVersion
from modelfleet.client.steps import Method, Procedure, Service, ask

_PATH = "/modelfleet.api.manager.v1.PoolService"
LIST_POOLS = Method(Service.MANAGER, f"{_PATH}/ListPools", pb.ListPoolsResponse)
GET_POOL = Method(Service.MANAGER, f"{_PATH}/GetPool", pb.GetPoolResponse)
SCALE_POOL = Method(Service.MANAGER, f"{_PATH}/ScalePool", pb.ScalePoolResponse)


def pools(*, timeout_s: float | None = None) -> Procedure[tuple[Pool, ...]]:
    """List all pools with their workers, ordered by name."""
    found: list[Pool] = []
    request = pb.ListPoolsRequest()
    while True:
        page = yield from ask(LIST_POOLS, request, timeout_s)
        found.extend(_pool(pool) for pool in page.pools)
        if not page.next_page_token:
            return tuple(found)
        request = pb.ListPoolsRequest(page_token=page.next_page_token)


def get_pool(pool: str, *, timeout_s: float | None = None) -> Procedure[Pool]:
    """Return a pool with its workers. Raises PoolNotFoundError."""
    response = yield from ask(GET_POOL, pb.GetPoolRequest(pool=pool), timeout_s)
    return _pool(response.pool)


def scale_pool(pool: str, replicas: int, *, timeout_s: float | None = None) -> Procedure[Pool]:
    """Ask for a number of workers, and return before they come or go. Raises StateConflictError where it cannot be."""
    response = yield from ask(SCALE_POOL, pb.ScalePoolRequest(pool=pool, replicas=replicas), timeout_s)
    return _pool(response.pool)


def _pool(pool: pb.Pool) -> Pool:
    return Pool(
        pool=pool.pool,
        desired_replicas=pool.desired_replicas,
        ready_replicas=pool.ready_replicas,
        gpu_resource=pool.gpu_resource,
        gpus_per_worker=pool.gpus_per_worker,
        images=tuple(pool.images),
        problem=pool.problem,
        workers=tuple(_worker(worker) for worker in pool.workers),
        observe_time=pool.observe_time.ToDatetime(UTC),
    )


def _worker(worker: pb.PoolWorker) -> PoolWorker:
    return PoolWorker(
        worker=worker.worker,
        node=worker.node,
        ready=worker.ready,
        image=worker.image,
        problem=worker.problem,
        restart_count=worker.restart_count,
        versions=tuple(
            WorkerVersion(
                model=version.model,
                model_version=version.model_version,
                state=VersionState.Name(version.state).removeprefix("VERSION_STATE_"),
                state_reason=version.reason,
                providers=tuple(version.providers),
            )
            for version in worker.versions
        ),
    )
