"""Starts the manager: registry, blobs, assignments."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import prometheus_client
from pydantic import Field, field_validator

from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.api.manager.v1.pool_service_pb2_grpc import add_PoolServiceServicer_to_server
from modelfleet.api.manager.v1.rollout_service_pb2_grpc import add_RolloutServiceServicer_to_server
from modelfleet.api.manager.v1.storage_service_pb2_grpc import add_StorageServiceServicer_to_server
from modelfleet.api.manager.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from modelfleet.manager.assignments import Assignments
from modelfleet.manager.blob_check import BlobCheck
from modelfleet.manager.blob_store import BlobStore, check_blob_url
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.garbage import GarbageCollector
from modelfleet.manager.leadership import Leadership
from modelfleet.manager.metrics import ManagerCollector
from modelfleet.manager.pools.local import LocalPools
from modelfleet.manager.pools.pool import Pools
from modelfleet.manager.registry import Registry
from modelfleet.manager.rollout_control import RolloutControl
from modelfleet.manager.rollouts import Rollouts
from modelfleet.manager.servicers.model_servicer import ModelServicer
from modelfleet.manager.servicers.pool_servicer import PoolServicer
from modelfleet.manager.servicers.rollout_servicer import RolloutServicer
from modelfleet.manager.servicers.storage_servicer import StorageServicer
from modelfleet.manager.servicers.worker_servicer import WorkerServicer
from modelfleet.manager.store.database import Database, check_database_url
from modelfleet.manager.uploads import Uploads
from modelfleet.manager.workers import Workers
from modelfleet.runtime.errors import KubernetesUnreachableError, StorageUnreachableError
from modelfleet.runtime.server import Server, run, until_signalled
from modelfleet.runtime.settings import ServerSettings, read_settings

SERVICES = (
    "modelfleet.api.manager.v1.ModelService",
    "modelfleet.api.manager.v1.PoolService",
    "modelfleet.api.manager.v1.RolloutService",
    "modelfleet.api.manager.v1.StorageService",
    "modelfleet.api.manager.v1.WorkerService",
)


class Settings(ServerSettings):
    """Settings of the manager."""

    port: int = Field(default=8003, ge=0, le=65535)
    """Port of the gRPC server; 0 picks a free one."""
    metrics_port: int = Field(default=9003, ge=0, le=65535)
    """Port of Prometheus metrics; 0 picks a free one."""
    data_dir: Path = Path("modelfleet-data")
    """Directory of the database and the blobs, made when missing, unless the next two place them elsewhere."""
    database_url: str = ""
    """SQLAlchemy URL of the registry's database. Empty for SQLite in DATA_DIR/manager.db."""
    blob_url: str = ""
    """URL of the place of the blobs, such as s3://bucket/prefix with the usual AWS_* variables. Empty for
    DATA_DIR/blobs."""
    blob_grace_s: float = Field(default=24 * 3600, ge=0)
    """How long a blob is kept that no model version has, after a push asked for it or its last version was deleted."""
    gc_interval_s: float = Field(default=3600, ge=0)
    """Pause between garbage collections, the first of which is at the start; 0 for none."""
    presigned_url_lifetime_s: float = Field(default=900, ge=0, le=7 * 24 * 3600)
    """How long a URL is good for with which a worker reads a blob straight from an object store; 0 to give out none."""
    worker_ttl_s: float = Field(default=60, gt=0)
    """A worker that has not reported for this long is taken for gone."""
    leader_lease_s: float = Field(default=5, gt=0)
    """Of several managers on one database one leads rollouts; another takes over when it is silent for this long."""
    pools: Literal["local", "kubernetes"] = "local"
    """Where workers run: `local` knows those that report, `kubernetes` also watches and scales Deployments."""
    local_pool: Path | None = None
    """Directory in which `modelfleet up` and the manager agree on workers; without it, nothing local is scaled."""
    namespace: str = "default"
    """Namespace of the pools' Deployments."""
    pool_selector: str = "app.kubernetes.io/component=inference"
    """Label selector of the pools' Deployments and pods; the label modelfleet.dev/pool tells one pool from another."""

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, url: str) -> str:
        if url:
            check_database_url(url)
        return url

    @field_validator("blob_url")
    @classmethod
    def _check_blob_url(cls, url: str) -> str:
        if url:
            check_blob_url(url)
        return url

    @property
    def database(self) -> str:
        """The database's URL, default applied."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'manager.db'}"

    @property
    def blobs(self) -> str:
        """The blobs' URL, default applied."""
        return self.blob_url or (self.data_dir.absolute() / "blobs").as_uri()


@asynccontextmanager
async def managing(settings: Settings) -> AsyncIterator[Server]:
    """Serve until the block ends, then drain."""
    database = Database(settings.database)
    await asyncio.to_thread(database.migrate)
    store = await asyncio.to_thread(BlobStore, settings.blobs)
    blobs = Blobs(store, database, timedelta(seconds=settings.presigned_url_lifetime_s))
    garbage = GarbageCollector(database, store, settings.blob_grace_s)
    check = BlobCheck(database, store, settings.blob_grace_s)
    async with Assignments(database) as assignments, AsyncExitStack() as stack:
        workers = Workers(database, settings.worker_ttl_s)
        pools = await stack.enter_async_context(_watched_pools(settings, workers))
        control = RolloutControl(database, workers, Leadership(database, settings.leader_lease_s), assignments.changed)

        def changed() -> None:
            assignments.changed()
            control.wake()

        registry = Registry(database, assignments.changed)
        rollouts = Rollouts(database, workers, changed)
        collector = ManagerCollector(database, workers)
        server = Server(settings, SERVICES)
        add_ModelServiceServicer_to_server(ModelServicer(registry, blobs, Uploads(blobs, registry)), server.grpc)
        add_PoolServiceServicer_to_server(PoolServicer(pools, workers), server.grpc)
        add_RolloutServiceServicer_to_server(RolloutServicer(rollouts), server.grpc)
        add_WorkerServiceServicer_to_server(WorkerServicer(assignments, workers), server.grpc)
        add_StorageServiceServicer_to_server(StorageServicer(garbage, check), server.grpc)
        await server.start()
        prometheus_client.REGISTRY.register(collector)
        await server.set_serving(serving=True)
        collecting = asyncio.create_task(garbage.run(settings.gc_interval_s), name="garbage")
        controlling = asyncio.create_task(control.run(), name="rollouts")
        try:
            yield server
        finally:
            for task in (collecting, controlling):
                task.cancel()
            await asyncio.wait([collecting, controlling])
            # Watches never end by themselves, and the drain waits for running calls.
            await server.drain(assignments.close)
            prometheus_client.REGISTRY.unregister(collector)
    await asyncio.to_thread(database.close)


@asynccontextmanager
async def _watched_pools(settings: Settings, workers: Workers) -> AsyncIterator[Pools]:
    """Give the pools, kept up to date until the block ends."""
    async with AsyncExitStack() as stack:
        pools: Pools = LocalPools(workers, settings.local_pool)
        if settings.pools == "kubernetes":
            # The client takes half a second to import, and only managers in a cluster need it.
            from modelfleet.manager.pools.kubernetes import KubernetesPools, kubernetes_client  # noqa: PLC0415

            client = await stack.enter_async_context(kubernetes_client())
            pools = KubernetesPools(client, settings.namespace, settings.pool_selector)
        watching = asyncio.create_task(pools.run(), name="pools")
        try:
            yield pools
        finally:
            watching.cancel()
            await asyncio.wait([watching])


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with managing(settings):
        await until_signalled()


def main() -> None:
    """Read the settings and serve."""
    settings = read_settings(
        Settings,
        "python -m modelfleet.manager",
        "The manager of modelfleet: keeps models, their versions and aliases, and tells workers what to serve.",
    )
    try:
        run(lambda: serve(settings), settings, "manager")
    except (StorageUnreachableError, KubernetesUnreachableError) as error:
        raise SystemExit(f"The manager cannot start: {error.message}") from error


if __name__ == "__main__":
    main()
