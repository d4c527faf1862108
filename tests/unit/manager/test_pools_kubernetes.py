"""Pools on Kubernetes, against an API over real HTTP that allows what the chart's Role allows, and nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness.chart import NAMESPACE, render
from harness.kubernetes_api import Call, Failure, Json, KubernetesApi, running_api, write_kubeconfig
from kubernetes.aio.client import ApiClient, Configuration
from modelfleet.manager.pools.kubernetes import KubernetesPools, kubernetes_client
from modelfleet.manager.pools.pool import Pool
from modelfleet.manager.pools.reflector import pause_s
from modelfleet.runtime.errors import (
    InvalidInputError,
    KubernetesUnreachableError,
    OverloadedError,
    PoolNotFoundError,
    StateConflictError,
)

MANIFESTS = render(
    {
        "inference": {
            "poolDefaults": {"manageReplicas": False},
            "pools": {"default": {}, "spare": {"device": "cpu", "gpu": {"count": 0}}},
        }
    }
)
RULES = MANIFESTS.one("Role", "manager")["rules"]
SELECTOR = str(MANIFESTS.environment("manager")["MODELFLEET_POOL_SELECTOR"])


def deployment(pool: str = "default", **status: object) -> Json:
    """The chart's own Deployment, as the API would return it."""
    found: Json = json.loads(json.dumps(MANIFESTS.one("Deployment", f"pool-{pool}")))
    return {**found, "spec": {**found["spec"], "replicas": 2}, "status": status}


def pod(name: str, pool: str = "default", *, node: str = "node-1", ready: bool = True, **status: object) -> Json:
    template = deployment(pool)["spec"]["template"]
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {
        "metadata": {"name": name, "labels": template["metadata"]["labels"]},
        "spec": {**template["spec"], "nodeName": node},
        "status": {"phase": "Running", "conditions": conditions, **status},
    }


@asynccontextmanager
async def watching(api: KubernetesApi, *, resync_s: float = 60) -> AsyncIterator[KubernetesPools]:
    """Watch until the block ends; starts once pools are known, where the API answers at all."""
    async with ApiClient(Configuration(host=f"http://127.0.0.1:{api.port}")) as client:
        pools = KubernetesPools(client, NAMESPACE, SELECTOR, resync_s=resync_s, longest_pause_s=0.2)
        task = asyncio.create_task(pools.run())
        try:
            yield pools
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    async with running_api(RULES) as running:
        await running.put("deployments", deployment())
        await running.put("pods", pod("worker-a"))
        yield running


async def until(true: Callable[[tuple[Pool, ...]], object], pools: KubernetesPools) -> tuple[Pool, ...]:
    """Return the pools once something is true of them."""
    async with asyncio.timeout(10):
        while True:
            try:
                known = await pools.list()
                if true(known):
                    return known
            except KubernetesUnreachableError:
                pass
            await asyncio.sleep(0.01)


async def watched(api: KubernetesApi, pools: KubernetesPools) -> None:
    """Return once both watches are open."""
    await until(lambda _: api.watches == 2, pools)


def names(pools: tuple[Pool, ...]) -> list[str]:
    return [worker.worker for pool in pools for worker in pool.workers]


async def test_a_pool_tells_its_workers_nodes_gpus_and_images(api: KubernetesApi) -> None:
    await api.put("deployments", deployment("spare"))
    await api.put("pods", pod("worker-b", node="node-2"))

    async with watching(api) as pools:
        default, spare = await until(len, pools)

    assert (default.pool, default.desired_replicas, default.ready_replicas) == ("default", 2, 2)
    assert (default.gpu_resource, default.gpus_per_worker) == ("nvidia.com/gpu", 1)
    assert default.images == ("modelfleet/inference:0.1.0-gpu",)
    assert [(worker.worker, worker.node, worker.ready) for worker in default.workers] == [
        ("worker-a", "node-1", True),
        ("worker-b", "node-2", True),
    ]
    assert (spare.pool, spare.gpu_resource, spare.gpus_per_worker, spare.workers) == ("spare", "", 0, ())


UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": UNSCHEDULABLE,
                    }
                ],
            },
            f"Unschedulable: {UNSCHEDULABLE}",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {
                        "restartCount": 0,
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
                    }
                ],
            },
            "ImagePullBackOff: Back-off pulling image",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "restartCount": 4,
                        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                    }
                ]
            },
            "CrashLoopBackOff: back-off 40s; it ended with 137, OOMKilled",
        ),
        (
            {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]},
            "Pending: its container is being started",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "restartCount": 1,
                        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                        "lastState": {
                            "terminated": {
                                "exitCode": 1,
                                "reason": "Error",
                                "message": '{"event": "metrics"}\nThe worker cannot start: no GPU.\n',
                            }
                        },
                    }
                ]
            },
            "CrashLoopBackOff: back-off 40s; it ended with 1, Error: The worker cannot start: no GPU.",
        ),
        ({}, "NotReady: loads its models, or drains"),
        (
            {
                "containerStatuses": [
                    {"restartCount": 1, "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1}}}
                ]
            },
            "NotReady: loads its models, or drains; it ended with 1, Error",
        ),
        (
            {"containerStatuses": [{"state": {"terminated": {"exitCode": 1, "message": "No space left"}}}]},
            "NotReady: loads its models, or drains; it ended with 1, Error: No space left",
        ),
    ],
)
async def test_a_worker_that_is_not_ready_says_why(api: KubernetesApi, found: dict, problem: str) -> None:
    await api.put("pods", pod("worker-a", ready=False, **found))

    async with watching(api) as pools:
        (default,) = await until(len, pools)

    assert default.workers[0].problem == problem
    assert default.ready_replicas == 0


async def test_pods_that_have_ended_are_no_workers_but_tell_why_one_is_missing(api: KubernetesApi) -> None:
    """They stay for days, beside those that took their place."""
    for name, created, message in (
        ("a", "2026-01-01T00:00:00Z", "old"),
        ("b", "2026-02-01T00:00:00Z", "low on memory"),
    ):
        ended = pod(f"ended-{name}", ready=False, phase="Failed", reason="Evicted", message=message)
        ended["metadata"]["creationTimestamp"] = created
        await api.put("pods", ended)

    async with watching(api) as pools:
        (short,) = await until(len, pools)
        await api.put("pods", pod("worker-b"))
        (whole,) = await until(lambda known: len(names(known)) == 2, pools)

    assert [worker.worker for worker in short.workers] == ["worker-a"]
    assert short.problem == "ended-b ended. Evicted: low on memory"
    assert (whole.ready_replicas, whole.problem) == (2, "")


async def test_the_image_is_the_workers_and_not_that_of_a_proxy_beside_it(api: KubernetesApi) -> None:
    meshed = pod("worker-a")
    meshed["spec"]["containers"] = [{"name": "proxy", "image": "mesh:1"}, *meshed["spec"]["containers"]]
    await api.put("pods", meshed)

    async with watching(api) as pools:
        (default,) = await until(len, pools)

    assert default.images == (default.workers[0].image,) == ("modelfleet/inference:0.1.0-gpu",)


@pytest.mark.parametrize(
    ("gpu", "stored", "expected"),
    [
        ({"resource": "nvidia.com/mig-1g.10gb", "count": 2}, "2", ("nvidia.com/mig-1g.10gb", 2)),
        ({"resource": "nvidia.com/gpu.shared"}, "1", ("nvidia.com/gpu.shared", 1)),
        ({"resource": "nvidia.com/gpumem", "count": 4000}, "4k", ("nvidia.com/gpumem", 4000)),
    ],
)
async def test_any_gpu_resource_is_told(
    api: KubernetesApi, gpu: dict[str, object], stored: str, expected: tuple[str, int]
) -> None:
    limits = {"github.com/fuse": "1", "memory": "8Gi", "rdma/hca": "1"}
    values = {"gpu": gpu, "resources": {"limits": limits}}
    chart = render({"inference": {"pools": {"default": values}}}).one("Deployment", "pool-default")
    found: Json = {**json.loads(json.dumps(chart)), "status": {}}
    found["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"][gpu["resource"]] = stored
    await api.put("deployments", found)

    async with watching(api) as pools:
        (default,) = await until(len, pools)

    assert (default.gpu_resource, default.gpus_per_worker) == expected


async def test_a_pool_with_an_autoscaler_is_left_to_it(api: KubernetesApi) -> None:
    scaled = render({"inference": {"pools": {"default": {"autoscaling": {"enabled": True}}}}})
    await api.put("deployments", {**json.loads(json.dumps(scaled.one("Deployment", "pool-default"))), "status": {}})

    async with watching(api) as pools:
        await until(len, pools)
        with pytest.raises(StateConflictError, match=r"default is scaled by an autoscaler \(hpa\).*autoscaling"):
            await pools.scale("default", 5)

    assert not api.seen("patch", "deployments/scale")


async def test_a_pool_whose_release_sets_its_number_is_left_to_it(api: KubernetesApi) -> None:
    """Server-side apply would end the release's next upgrade in a conflict, with some objects applied."""
    managed = render({"inference": {"pools": {"default": {"replicas": 2}}}}).one("Deployment", "pool-default")
    await api.put("deployments", {**json.loads(json.dumps(managed)), "status": {}})

    async with watching(api) as pools:
        await until(len, pools)
        with pytest.raises(StateConflictError, match=r"set by its Helm release. Set inference.pools.default.replicas"):
            await pools.scale("default", 5)

    assert not api.seen("patch", "deployments/scale")


async def test_a_pool_that_cannot_have_its_workers_says_why(api: KubernetesApi) -> None:
    quota = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: gpus"}
    await api.put("deployments", deployment(conditions=[quota]))

    async with watching(api) as pools:
        (default,) = await until(len, pools)

    assert default.problem == "FailedCreate: exceeded quota: gpus"


async def test_changes_arrive_as_they_happen(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await watched(api, pools)
        await api.put("pods", pod("worker-b", node="x" * 300_000))  # an event larger than any buffer on the way
        await until(lambda known: names(known) == ["worker-a", "worker-b"], pools)
        await api.delete("pods", "worker-a")
        await until(lambda known: names(known) == ["worker-b"], pools)

    assert api.seen("list", "pods") == 1


async def test_a_watch_from_a_forgotten_version_lists_again(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await watched(api, pools)
        gone = Failure(200, json.dumps({"type": "ERROR", "object": {"code": 410, "message": "too old"}}) + "\n")
        api.fail("watch pods", gone, Failure(410))
        await api.change_unnoticed("pods", pod("worker-new"))
        await api.forget()
        await api.break_watches()

        await until(lambda known: names(known) == ["worker-a", "worker-new"], pools)
        await watched(api, pools)


async def test_an_api_server_that_restarts_is_watched_again(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await watched(api, pools)
        await api.stop()
        (default,) = await until(lambda _: not api.watches, pools)
        assert names((default,)) == ["worker-a"], "what was known is still told"
        with pytest.raises(KubernetesUnreachableError, match="cannot be reached, so default may not be scaled"):
            await pools.scale("default", 3)

        await api.change_unnoticed("pods", pod("worker-new"))
        await api.start()

        await until(lambda known: names(known) == ["worker-a", "worker-new"], pools)
        # Deployments may be listed a moment after pods.
        await until(lambda known: known[0].observe_time > default.observe_time, pools)


@pytest.mark.slow
async def test_what_was_missed_is_found_at_the_next_resync(api: KubernetesApi) -> None:
    async with watching(api, resync_s=1) as pools:
        await watched(api, pools)
        await api.change_unnoticed("pods", pod("worker-new"))

        await until(lambda known: names(known) == ["worker-a", "worker-new"], pools)


@pytest.mark.slow
async def test_a_busy_api_is_asked_again_after_the_pause_that_it_names(api: KubernetesApi) -> None:
    api.fail("list pods", Failure(429, "Too many requests, please try again later.", {"Retry-After": "1"}))
    began = asyncio.get_running_loop().time()

    async with watching(api) as pools:
        await until(len, pools)

    assert asyncio.get_running_loop().time() - began >= 1
    assert api.seen("list", "pods") == 2


def test_pauses_double_up_to_the_longest_however_long_the_api_is_away() -> None:
    pauses = [pause_s(failures, 30) for failures in (1, 2, 3, 12, 5_000_000)]

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 30, 30], rel=0.21)


@pytest.mark.parametrize("status", [500, 503])
async def test_a_failing_api_is_asked_again(api: KubernetesApi, status: int) -> None:
    api.fail(
        "list deployments",
        Failure(status, "etcdserver: leader changed"),
        Failure(200, "<html>a proxy</html>"),
        Failure(200, "{}"),
    )
    api.fail("watch deployments", Failure(status))

    async with watching(api) as pools:
        await until(len, pools)
        await watched(api, pools)


async def test_before_the_first_answer_pools_are_unknown(api: KubernetesApi) -> None:
    api.fail("list pods", *[Failure(500)] * 1000)

    async with watching(api) as pools:
        with pytest.raises(KubernetesUnreachableError, match="Pools are not known"):
            await pools.list()


async def test_scaling_changes_the_number_alone(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await until(len, pools)
        scaled = await pools.scale("default", 5)

        assert scaled.desired_replicas == 5
        await until(lambda known: known[0].desired_replicas == 5, pools)
        assert (await pools.scale("default", 0)).desired_replicas == 0


async def test_a_pool_that_is_not_there_is_not_found(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await until(len, pools)

        with pytest.raises(PoolNotFoundError, match=r"no pool 'a10'\. Pools: default"):
            await pools.scale("a10", 1)


@pytest.mark.parametrize("replicas", [-1, 10_001])
async def test_an_impossible_number_is_refused(api: KubernetesApi, replicas: int) -> None:
    async with watching(api) as pools:
        with pytest.raises(InvalidInputError, match=f"replicas is {replicas}"):
            await pools.scale("default", replicas)

    assert not api.seen("patch", "deployments/scale")


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (
            Failure(401),
            StateConflictError,
            "answered 401. It does not take the manager's token.*delete the manager's pod",
        ),
        (Failure(403), StateConflictError, "answered 403. The manager's Role lacks .*`patch` on deployments/scale"),
        (Failure(404), PoolNotFoundError, "was deleted"),
        (Failure(409), StateConflictError, "refuses to scale default"),
        (Failure(429, headers={"Retry-After": "7"}), OverloadedError, "busy"),
        (Failure(503), KubernetesUnreachableError, "answered 503"),
    ],
)
async def test_a_refusal_to_scale_says_what_to_do(
    api: KubernetesApi, failure: Failure, error: type[Exception], message: str
) -> None:
    api.fail("patch deployments/scale", failure)

    async with watching(api) as pools:
        await until(len, pools)
        with pytest.raises(error, match=message) as raised:
            await pools.scale("default", 3)
        assert (await pools.scale("default", 4)).desired_replicas == 4, "the next call goes through"

    if isinstance(raised.value, OverloadedError):
        assert raised.value.retry_after_s == 7


async def test_the_role_allows_the_calls_that_are_made_and_no_other(api: KubernetesApi) -> None:
    async with watching(api) as pools:
        await watched(api, pools)
        await pools.list()
        await pools.scale("default", 3)

    allowed = {
        Call(verb, group, resource)
        for rule in RULES
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(api.calls) == allowed


async def test_without_the_role_pools_stay_unknown() -> None:
    async with running_api(rules=[]) as api, watching(api) as pools:
        async with asyncio.timeout(10):
            while True:
                message = await refusal(pools)
                if "403 to a request for" in message:
                    break
                await asyncio.sleep(0.01)

    assert "The manager's Role lacks" in message


async def refusal(pools: KubernetesPools) -> str:
    with pytest.raises(KubernetesUnreachableError) as raised:
        await pools.list()
    return raised.value.message


async def test_outside_a_cluster_the_kubeconfig_leads_to_the_api(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = write_kubeconfig(tmp_path / "config", api.port)
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))

    async with kubernetes_client() as client:
        assert client.configuration.host == f"http://127.0.0.1:{api.port}"
