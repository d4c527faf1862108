"""Pools: what each value of one does."""

import pytest
from harness.chart import CHART, Object, render, render_file

GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def pool(values: dict | None = None, name: str = "default") -> Object:
    rendered = render({"inference": {"pools": {name: values or {}}}})
    return rendered.one("Deployment", f"pool-{name}")["spec"]


def pod(values: dict | None = None) -> Object:
    return pool(values)["template"]["spec"]


def container(values: dict | None = None) -> Object:
    return pod(values)["containers"][0]


def environment(values: dict | None = None) -> dict[str, object]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(values)["env"]}


def test_the_default_pool_asks_for_a_gpu_where_gpus_are() -> None:
    spec = pod()

    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"] == [GPU_TAINT]
    assert spec["containers"][0]["image"].endswith("-gpu")
    assert environment()["MODELFLEET_DEVICE"] == "cuda"


def test_without_a_gpu_nothing_asks_for_one() -> None:
    manifests = render_file(CHART / "values-cpu.yaml")
    spec = manifests.one("Deployment", "pool-default")["spec"]["template"]["spec"]

    assert "nvidia.com/gpu" not in str(manifests.objects)
    assert "nodeSelector" not in spec
    assert "tolerations" not in spec
    assert not spec["containers"][0]["image"].endswith("-gpu")
    assert manifests.environment("pool-default")["MODELFLEET_DEVICE"] == "cpu"


def test_a_rollout_needs_no_spare_gpu() -> None:
    assert pool()["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_worker_is_named_by_its_pod_and_told_its_pool() -> None:
    variables = environment()

    assert variables["MODELFLEET_WORKER"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert variables["MODELFLEET_POOL"] == "default"
    assert variables["MODELFLEET_MANAGER"] == "dns:///demo-modelfleet-manager-headless.ml.svc:8003"
    assert variables["MODELFLEET_TOKENIZER"] == "dns:///demo-modelfleet-tokenizer-headless.ml.svc:8002"


@pytest.mark.parametrize(
    ("values", "variable", "expected"),
    [
        ({"batch": {"maxBatchTokens": 32768}}, "MODELFLEET_MAX_BATCH_TOKENS", "32768"),
        ({"batch": {"maxQueueTokens": 1000000}}, "MODELFLEET_MAX_QUEUE_TOKENS", "1000000"),
        ({"memory": {"deviceBytes": 80_000_000_000}}, "MODELFLEET_DEVICE_MEMORY_BYTES", "80000000000"),
        ({"memory": {"hostBytes": 8_000_000_000}}, "MODELFLEET_MEMORY_BYTES", "8000000000"),
        ({"memory": {"generationCacheBytes": 5}}, "MODELFLEET_GENERATION_CACHE_BYTES", "5"),
        ({"memory": {"maxLoadedVersions": 6}}, "MODELFLEET_MAX_LOADED_VERSIONS", "6"),
        ({"memory": {"evictIdle": True}}, "MODELFLEET_EVICT_IDLE", "true"),
        ({"batch": {"maxStreams": 7}}, "MODELFLEET_MAX_STREAMS", "7"),
        ({"threads": 3}, "MODELFLEET_THREADS", "3"),
        ({"device": "tensorrt", "image": {"tag": "trt"}}, "MODELFLEET_DEVICE", "tensorrt"),
        ({"extraEnv": [{"name": "MODELFLEET_MAX_TEXTS", "value": "7"}]}, "MODELFLEET_MAX_TEXTS", "7"),
    ],
)
def test_settings_reach_the_worker(values: dict, variable: str, expected: str) -> None:
    assert environment(values)[variable] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nodeSelector", {"gpu": "a10"}),
        ("tolerations", [{"key": "dedicated", "operator": "Exists"}]),
        ("runtimeClassName", "nvidia"),
        ("priorityClassName", "high"),
        ("schedulerName", "volcano"),
        ("affinity", {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
    ],
)
def test_a_pool_replaces_a_part_of_scheduling_whole(key: str, value: object) -> None:
    assert pod({key: value})[key] == value


def test_topology_spreads_the_pools_own_workers() -> None:
    (constraint,) = pod({"topologySpreadConstraints": [{"maxSkew": 2, "topologyKey": "zone"}]})[
        "topologySpreadConstraints"
    ]

    assert constraint["maxSkew"] == 2
    assert constraint["labelSelector"]["matchLabels"]["modelfleet.dev/pool"] == "default"


def test_another_gpu_resource_and_count_are_asked_for() -> None:
    limits = container({"gpu": {"resource": "nvidia.com/gpumem", "count": 24_000_000}})["resources"]["limits"]

    assert limits["nvidia.com/gpumem"] == "24000000"
    assert "nvidia.com/gpu" not in limits


def test_nodes_without_the_label_of_gpus_are_taken_when_none_is_asked_for() -> None:
    rendered = render({"inference": {"poolDefaults": {"nodeSelector": None, "resources": None}}})
    spec = rendered.one("Deployment", "pool-default")["spec"]["template"]["spec"]

    assert "nodeSelector" not in spec
    assert spec["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "1"}}


def test_shared_memory_has_its_size_or_is_left_out() -> None:
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}} in pod({"shm": {"size": "4Gi"}})[
        "volumes"
    ]
    assert all(volume["name"] != "shm" for volume in pod({"shm": {"size": ""}})["volumes"])


@pytest.mark.parametrize(
    ("cache", "volume"),
    [
        ({"size": "7Gi"}, {"emptyDir": {"sizeLimit": "7Gi"}}),
        (
            {"kind": "persistentVolumeClaim", "existingClaim": "models"},
            {"persistentVolumeClaim": {"claimName": "models"}},
        ),
        ({"kind": "hostPath", "hostPath": "/var/m"}, {"hostPath": {"path": "/var/m", "type": "DirectoryOrCreate"}}),
        (
            {"kind": "ephemeral", "size": "9Gi", "storageClassName": "nvme"},
            {
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": ["ReadWriteOnce"],
                            "storageClassName": "nvme",
                            "resources": {"requests": {"storage": "9Gi"}},
                        }
                    }
                }
            },
        ),
    ],
)
def test_the_cache_is_where_the_pool_says(cache: dict, volume: dict) -> None:
    assert {"name": "cache", **volume} in pod({"cache": cache})["volumes"]


def test_workers_on_one_node_never_share_a_cache() -> None:
    own = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    affinity = pod({"cache": {"kind": "hostPath", "hostPath": "/var/m"}, "affinity": own})["affinity"]

    (term,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert term["labelSelector"]["matchLabels"]["modelfleet.dev/pool"] == "default"
    assert affinity["podAffinity"] == own["podAffinity"]


def test_replicas_are_left_to_whoever_scales() -> None:
    assert pool({"replicas": 3})["replicas"] == 3
    assert pool({"replicas": 0})["replicas"] == 0
    assert "replicas" not in pool({"manageReplicas": False})
    assert "replicas" not in pool({"autoscaling": {"enabled": True}})


def test_a_pool_is_scaled_by_its_queue() -> None:
    scaled = render({"inference": {"pools": {"default": {"autoscaling": {"enabled": True, "queueRows": 9}}}}})

    spec = scaled.one("HorizontalPodAutoscaler", "pool-default")["spec"]
    assert spec["scaleTargetRef"]["name"] == "demo-modelfleet-pool-default"
    assert spec["metrics"][0]["pods"] == {
        "metric": {"name": "modelfleet_queue_rows"},
        "target": {"type": "AverageValue", "averageValue": "9"},
    }


def test_keda_reads_the_queue_of_the_pool_alone() -> None:
    """By labels and not by a pattern of pods' names, which also fits those of a pool `h100-slice-2`."""
    scaled = render_file(CHART / "examples" / "gpu-pools.yaml").one("ScaledObject", "pool-h100-slice")["spec"]

    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["serverAddress"] == "http://prometheus.monitoring:9090"
    assert trigger["metadata"]["query"] == (
        'sum(modelfleet_queue_rows{namespace="ml",app_kubernetes_io_instance="demo",modelfleet_dev_pool="h100-slice"})'
        " or vector(0)"
    )


def test_the_monitor_gives_series_the_labels_that_keda_asks_for() -> None:
    monitor = render_file(CHART / "examples" / "production.yaml").one("ServiceMonitor", "")["spec"]

    assert monitor["podTargetLabels"] == ["app.kubernetes.io/instance", "modelfleet.dev/pool"]


def test_requests_wake_a_pool_with_one_worker_and_its_queue_adds_others() -> None:
    asleep = {"enabled": True, "kind": "keda", "minReplicas": 0, "prometheusURL": "http://p", "activationQuery": "rate"}
    scaled = render({"inference": {"pools": {"default": {"autoscaling": asleep}}}}).one("ScaledObject", "pool-default")

    _, activation = scaled["spec"]["triggers"]
    assert activation["metadata"]["query"] == "clamp_max(sum(rate), 1)"
    assert activation["metadata"]["threshold"] == "1"


def test_a_pool_that_a_later_file_removes_is_gone() -> None:
    rendered = render({"inference": {"pools": {"a10": None}}})

    assert "pool-a10" not in str(rendered.objects)
    assert "pool-a10" not in rendered.notes


def test_an_autoscaled_pool_says_so_to_the_manager() -> None:
    def annotations(**autoscaling: object) -> dict:
        rendered = render({"inference": {"pools": {"default": {"autoscaling": autoscaling}}}})
        return rendered.one("Deployment", "pool-default")["metadata"]["annotations"]

    gpu = {"modelfleet.dev/gpu-resource": "nvidia.com/gpu"}
    assert annotations() == {**gpu, "modelfleet.dev/replicas": "release"}
    assert annotations(enabled=True) == {**gpu, "modelfleet.dev/autoscaler": "hpa"}


def test_a_pool_says_to_the_manager_whether_the_release_sets_its_number() -> None:
    def told(pool: dict) -> object:
        rendered = render({"inference": {"pools": {"default": pool}}})
        return rendered.one("Deployment", "pool-default")["metadata"]["annotations"].get("modelfleet.dev/replicas")

    assert (told({}), told({"manageReplicas": False})) == ("release", None)


def test_defaults_of_pools_hold_for_each_pool_that_says_nothing_else() -> None:
    rendered = render(
        {"inference": {"poolDefaults": {"replicas": 2}, "pools": {"a": {}, "b": {"replicas": 5}, "default": None}}}
    )
    counts = {name: found["spec"]["replicas"] for name, found in rendered.of("Deployment").items() if "pool" in name}

    assert counts == {"demo-modelfleet-pool-a": 2, "demo-modelfleet-pool-b": 5}


def test_only_pools_with_more_than_one_worker_have_a_budget() -> None:
    rendered = render({"inference": {"pools": {"default": {"replicas": 1}, "big": {"replicas": 2}}}})

    names = {name for name in rendered.of("PodDisruptionBudget") if "pool" in name}
    assert names == {"demo-modelfleet-pool-big"}


def test_a_worker_gets_the_time_that_its_models_take_to_load() -> None:
    spec = pool({"startup": {"timeoutSeconds": 1802}})
    probe = spec["template"]["spec"]["containers"][0]["startupProbe"]

    assert probe["failureThreshold"] * probe["periodSeconds"] >= 1802
    assert spec["progressDeadlineSeconds"] > 1802


def test_a_pool_has_a_headless_service_of_its_own() -> None:
    service = render({"inference": {"pools": {"a10": {}}}}).one("Service", "pool-a10")["spec"]

    assert service["clusterIP"] == "None"
    assert service["selector"]["modelfleet.dev/pool"] == "a10"
