"""Values that are refused, by the schema or by a sentence that says what to do."""

import helm_python
import pytest
from harness.chart import render


def with_pool(**values: object) -> dict:
    return {"inference": {"pools": {"default": values}}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"manager": {"replicas": 2}}, r"manager.replicas is 2, but SQLite serves one. Set manager.database.kind"),
        ({"manager": {"database": {"kind": "postgresql"}}}, r"Set manager.database.existingSecret"),
        ({"manager": {"blobs": {"kind": "s3"}}}, r"Set manager.blobs.url"),
        (
            {"manager": {"replicas": 2, "database": {"kind": "postgresql", "existingSecret": "db"}}},
            r"can be mounted on one node. Set manager.blobs.kind=s3",
        ),
        (with_pool(gpu={"count": 0}), r"pools.default runs on cuda but asks for no GPU. Set its gpu.count to 1"),
        (with_pool(device="cpu"), r"runs on the CPU but asks for 1 of nvidia.com/gpu"),
        (with_pool(cache={"kind": "persistentVolumeClaim"}), r"Set its cache.existingClaim"),
        (with_pool(cache={"kind": "hostPath"}), r"Set it to an absolute path"),
        (
            with_pool(replicas=2, cache={"kind": "persistentVolumeClaim", "existingClaim": "c"}),
            r"one claim as cache, which they cannot share",
        ),
        (with_pool(rollout={"maxSurge": 0, "maxUnavailable": 0}), r"no rollout could move"),
        (
            with_pool(cache={"kind": "persistentVolumeClaim", "existingClaim": "c"}, rollout={"maxSurge": 1}),
            r"one claim as cache, which they cannot share.*rollout.maxSurge to 0",
        ),
        (
            with_pool(cache={"kind": "hostPath", "hostPath": "/c"}, rollout={"maxSurge": 1, "maxUnavailable": 0}),
            r"no node for a second worker. Set its rollout.maxUnavailable to 1",
        ),
        (
            {
                "inference": {
                    "poolDefaults": {"cache": {"kind": "hostPath", "hostPath": "/var/m"}},
                    "pools": {"a": {}, "b": {}, "default": None},
                }
            },
            r"pools.a and inference.pools.b both keep their cache in hostPath /var/m, which workers cannot share",
        ),
        (
            {
                "inference": {
                    "poolDefaults": {"cache": {"kind": "persistentVolumeClaim", "existingClaim": "c"}},
                    "pools": {"a": {}},
                }
            },
            r"pools.a and inference.pools.default both keep their cache in persistentVolumeClaim c",
        ),
        (with_pool(device="tensorrt"), r"runs on tensorrt, which the gpu image lacks. Set its image.repository or"),
        (with_pool(autoscaling={"enabled": True, "minReplicas": 9}), r"minReplicas 9 and maxReplicas 4"),
        (with_pool(autoscaling={"enabled": True, "kind": "keda"}), r"Set its autoscaling.prometheusURL"),
        (with_pool(autoscaling={"enabled": True, "minReplicas": 0}), r"an HPA never wakes a pool"),
        ({"inference": {"pools": {"Big_Pool": {}}}}, r"The pool's name \\?\"Big_Pool\\?\" is not one"),
        ({"inference": {"pools": {"x" * 21: {}}}}, r"up to 20 lower-case letters"),
        ({"tokenizer": {"autoscaling": {"enabled": True, "minReplicas": 50}}}, r"minReplicas is 50 and maxReplicas 10"),
        ({"models": {"initial": [{"name": "m", "source": "/models/m"}]}}, r"Set models.existingClaim"),
        (
            {"models": {"initial": [{"name": "m", "source": "hf://a/b", "pools": ["none"]}]}},
            r"models.initial: m is to be served by the pool none, which is not among inference.pools: default",
        ),
        (
            {"batch": {"enabled": True, "pool": "none"}},
            r"batch.pool is none, which is not among inference.pools: default",
        ),
        ({"batch": {"enabled": True}}, r"needs all of batch.model, batch.input and batch.output"),
        (
            {"batch": {"enabled": True, "model": "m", "input": "a", "output": "b"}},
            r"nothing is mounted at /data. Set batch.existingClaim",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=sentence):
        render(values)


def test_a_release_whose_name_is_too_long_is_refused() -> None:
    with pytest.raises(helm_python.HelmRenderError, match="Set fullnameOverride to at most 36"):
        render(release="a-release-with-quite-a-long-name")


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCount": 2},
        {"tokenizer": {"replicas": "2"}},
        {"tokenizer": {"replica": 2}},
        {"tokenizer": {"logLevel": "loud"}},
        {"tokenizer": {"service": {"type": "Cluster"}}},
        {"drain": {"delaySeconds": -1}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"manager": {"database": {"kind": "mysql"}}},
        {"models": {"initial": [{"name": "m"}]}},
        {"models": {"initial": [{"name": "m", "source": "ftp://x"}]}},
        with_pool(provider="cuda"),
        with_pool(device="gpu"),
        with_pool(gpu={"count": "one"}),
        with_pool(replicas=-1),
        with_pool(replicas=None),  # of which Helm's versions make different things
        with_pool(tolerations={}),
        with_pool(autoscaling={"kind": "vpa"}),
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_unknown_or_of_the_wrong_type(values: dict) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        render(values)
