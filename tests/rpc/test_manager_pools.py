"""PoolService through a real manager, over workers that report and over a Kubernetes API."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from harness.chart import NAMESPACE, render
from harness.kubernetes_api import Failure, Json, KubernetesApi, running_api, write_kubeconfig
from modelfleet.api.manager.v1 import pool_service_pb2 as pb
from modelfleet.api.manager.v1.pool_service_pb2_grpc import PoolServiceStub
from modelfleet.api.manager.v1.version_state_pb2 import VERSION_STATE_FAILED, VERSION_STATE_READY, VERSION_STATE_WARMING
from modelfleet.api.manager.v1.worker_service_pb2 import ReportStatusRequest, VersionStatus
from modelfleet.api.manager.v1.worker_service_pb2_grpc import WorkerServiceStub
from modelfleet.client.async_client import AsyncClient
from modelfleet.client.channel import open_async_channel
from modelfleet.client.errors import from_rpc_error
from modelfleet.manager.__main__ import Settings, managing
from modelfleet.runtime.errors import Reason
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner

MANIFESTS = render({"inference": {"pools": {"default": {"manageReplicas": False}}}})


@dataclass(frozen=True)
class Manager:
    address: str
    pools: PoolServiceStub
    workers: WorkerServiceStub

    async def report(self, worker: str, pool: str, *versions: VersionStatus) -> None:
        await self.workers.ReportStatus(ReportStatusRequest(worker=worker, pool=pool, revision=1, versions=versions))

    async def refused(self, call: grpc.aio.UnaryUnaryCall, code: grpc.StatusCode, reason: Reason, message: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await call
        assert caught.value.code() is code
        assert from_rpc_error(caught.value).reason is reason
        await self.pools.ListPools(pb.ListPoolsRequest())  # still serves


@asynccontextmanager
async def running(data_dir: Path, **settings: str) -> AsyncIterator[Manager]:
    quick = {"host": "127.0.0.1", "port": 0, "drain_delay_s": 0, "drain_timeout_s": 2}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(managing(Settings(data_dir=data_dir, **quick, **settings)))
        address = f"127.0.0.1:{server.port}"
        channel = await stack.enter_async_context(open_async_channel(address, attempts=1))
        yield Manager(address, PoolServiceStub(channel), WorkerServiceStub(channel))


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running(tmp_path) as manager:
        yield manager


@pytest.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    deployment: Json = json.loads(json.dumps(MANIFESTS.one("Deployment", "pool-default")))
    template = deployment["spec"]["template"]
    async with running_api(MANIFESTS.one("Role", "manager")["rules"]) as api:
        await api.put("deployments", {**deployment, "status": {}})
        for name, node in (("worker-a", "node-1"), ("worker-b", "")):
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            if not node:
                message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
                unscheduled = {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": message,
                }
                status = {"phase": "Pending", "conditions": [unscheduled]}
            await api.put(
                "pods",
                {
                    "metadata": {"name": name, "labels": template["metadata"]["labels"]},
                    "spec": {**template["spec"], **({"nodeName": node} if node else {})},
                    "status": status,
                },
            )
        yield api


@pytest.fixture
async def cluster(api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Manager]:
    """A manager outside the cluster, which it finds by its kubeconfig."""
    kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", api.port)
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    selector = str(MANIFESTS.environment("manager")["MODELFLEET_POOL_SELECTOR"])
    async with running(tmp_path / "data", pools="kubernetes", namespace=NAMESPACE, pool_selector=selector) as manager:
        await api.called("watch", "pods")
        await api.called("watch", "deployments")
        yield manager


def version(state: int, reason: str = "") -> VersionStatus:
    return VersionStatus(model="pii", model_version=2, state=state, reason=reason, providers=["CUDAExecutionProvider"])


async def test_workers_that_report_are_pools_without_kubernetes(local: Manager) -> None:
    await local.report("worker-2", "local", version(VERSION_STATE_READY))
    await local.report("worker-1", "local", version(VERSION_STATE_WARMING))
    await local.report("worker-3", "other")

    first = await local.pools.ListPools(pb.ListPoolsRequest(page_size=1))
    second = await local.pools.ListPools(pb.ListPoolsRequest(page_token=first.next_page_token))

    (pool,) = first.pools
    assert (pool.pool, pool.desired_replicas, pool.ready_replicas) == ("local", 2, 1)
    assert [(worker.worker, worker.ready, worker.problem) for worker in pool.workers] == [
        ("worker-1", False, "pii@2 is WARMING"),
        ("worker-2", True, ""),
    ]
    assert [other.pool for other in second.pools] == ["other"]
    assert not second.next_page_token


async def test_a_worker_that_cannot_serve_says_why(local: Manager) -> None:
    await local.report("worker-1", "local", version(VERSION_STATE_FAILED, "out of memory"))

    pool = (await local.pools.GetPool(pb.GetPoolRequest(pool="local"))).pool

    assert pool.workers[0].problem == "pii@2 is FAILED, out of memory"
    assert pool.workers[0].versions[0].reason == "out of memory"


async def test_workers_that_others_started_are_not_scaled(local: Manager) -> None:
    await local.report("worker-1", "local")

    request = pb.ScalePoolRequest(pool="local", replicas=2)
    await local.refused(
        local.pools.ScalePool(request),
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.STATE_CONFLICT,
        "Start or stop workers where they run",
    )
    kept = await local.pools.ScalePool(pb.ScalePoolRequest(pool="local", replicas=1))
    assert kept.pool.desired_replicas == 1


async def test_a_pool_that_is_not_there_is_not_found(local: Manager) -> None:
    for call in (
        local.pools.GetPool(pb.GetPoolRequest(pool="a10")),
        local.pools.ScalePool(pb.ScalePoolRequest(pool="a10", replicas=1)),
    ):
        await local.refused(call, grpc.StatusCode.NOT_FOUND, Reason.POOL_NOT_FOUND, "no pool 'a10'")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ListPoolsRequest(page_size=-1), "page_size is -1"),
        (pb.ListPoolsRequest(page_token="x"), "page_token 'x'"),
        (pb.ScalePoolRequest(pool="local", replicas=-1), "replicas is -1"),
    ],
)
async def test_bad_input_is_refused(local: Manager, request_: object, message: str) -> None:
    call = local.pools.ListPools if isinstance(request_, pb.ListPoolsRequest) else local.pools.ScalePool

    await local.refused(call(request_), grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_a_pool_on_kubernetes_tells_what_each_worker_serves_or_lacks(cluster: Manager) -> None:
    await cluster.report("worker-a", "default", version(VERSION_STATE_READY))

    async with AsyncClient(manager=cluster.address) as client:
        (pool,) = await client.pools()

    assert (pool.desired_replicas, pool.ready_replicas, pool.gpu_resource, pool.gpus_per_worker) == (
        1,
        1,
        "nvidia.com/gpu",
        1,
    )
    first, second = pool.workers
    assert (first.node, first.ready, first.versions[0].state) == ("node-1", True, "READY")
    assert first.versions[0].providers == ("CUDAExecutionProvider",)
    assert (second.node, second.ready) == ("", False)
    assert second.problem == "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


async def test_a_pool_on_kubernetes_is_scaled(cluster: Manager, api: KubernetesApi) -> None:
    async with AsyncClient(manager=cluster.address) as client:
        scaled = await client.scale_pool("default", 3)

    assert scaled.desired_replicas == 3
    assert api.seen("patch", "deployments/scale") == 1


async def test_a_busy_kubernetes_api_is_told_to_the_caller(cluster: Manager, api: KubernetesApi) -> None:
    api.fail("patch deployments/scale", Failure(429, headers={"Retry-After": "3"}))

    request = pb.ScalePoolRequest(pool="default", replicas=3)
    await cluster.refused(
        cluster.pools.ScalePool(request), grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "busy"
    )


async def test_the_command_shows_and_scales_pools(cluster: Manager, api: KubernetesApi) -> None:
    async def run(*arguments: str) -> str:
        result = await asyncio.to_thread(
            CliRunner().invoke, app, ["pools", *arguments], env={"MODELFLEET_MANAGER": cluster.address}
        )
        assert result.exit_code == 0, result.output
        return result.output

    await cluster.report("worker-a", "default", version(VERSION_STATE_READY))

    assert "1 nvidia.com/gpu" in await run()
    shown = await run("show", "default")
    assert "pii@2 READY" in shown
    assert "Insufficient nvidia.com/gpu" in shown
    assert "default shall have 4 workers" in await run("scale", "default", "4")
    listed = json.loads((await run("list", "--json")).splitlines()[-1])
    assert listed["pools"][0]["workers"][1]["problem"].startswith("Unschedulable")
    await api.delete("pods", "worker-b")
    assert "1 are ready" in await run("scale", "default", "1", "--wait")


async def test_the_command_says_that_there_is_no_such_pool(local: Manager) -> None:
    result = await asyncio.to_thread(
        CliRunner().invoke, app, ["pools", "show", "a10"], env={"MODELFLEET_MANAGER": local.address}
    )

    assert result.exit_code == 4
    assert "There is no pool 'a10'" in result.output
