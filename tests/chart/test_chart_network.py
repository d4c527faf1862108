"""What the network lets through when it is closed: everything that the release needs, and nothing else."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from harness.chart import Manifests, Object, render

VALUES = {
    "networkPolicy": {"enabled": True, "egress": {"enabled": True}},
    "models": {"initial": [{"name": "m", "source": "hf://a/b"}]},
    "batch": {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b"},
    "inference": {"pools": {"a10": {}}},
}
PORTS = {"inference": 8001, "pool-default": 8001, "pool-a10": 8001, "tokenizer": 8002, "manager": 8003}


@pytest.fixture(scope="module")
def manifests() -> Manifests:
    return render(VALUES)


def labels(manifests: Manifests, name: str) -> Mapping[str, str]:
    """Return the labels of a pod, or of those of a Deployment or a Job, found by a part of its name."""
    workloads = (manifests.of("Deployment") | manifests.of("Job")).items()
    pods = [(full, workload["spec"]["template"]) for full, workload in workloads] + [*manifests.of("Pod").items()]
    (found,) = [pod for full, pod in pods if f"-{name}" in full]
    return found["metadata"]["labels"]


def passes(manifests: Manifests, source: Mapping[str, str], target: Mapping[str, str], port: int) -> bool:
    """Return whether pods with these labels, of one namespace, may connect: both of their policies must let them."""
    return _open(manifests, "Egress", source, target, port) and _open(manifests, "Ingress", target, source, port)


def _open(manifests: Manifests, way: str, own: Mapping[str, str], peer: Mapping[str, str], port: int) -> bool:
    policies = [
        policy["spec"]
        for policy in manifests.of("NetworkPolicy").values()
        if way in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], own)
    ]
    rules = [rule for policy in policies for rule in policy.get(way.lower(), ())]
    return not policies or any(_matches(rule, "to" if way == "Egress" else "from", peer, port) for rule in rules)


def _matches(rule: Object, peers: str, labels: Mapping[str, str], port: int) -> bool:
    ports = [one["port"] for one in rule["ports"] if one.get("protocol", "TCP") == "TCP"]
    selectors = [peer["podSelector"] for peer in rule.get(peers, ())]
    return port in ports and (not selectors or any(_selects(selector, labels) for selector in selectors))


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def needed() -> Iterator[tuple[str, str]]:
    for pool in ("pool-default", "pool-a10"):
        yield pool, "tokenizer"
        yield pool, "manager"
    yield "tokenizer", "manager"
    for job in ("test", "models", "batch"):
        yield from ((job, service) for service in ("pool-default", "pool-a10", "tokenizer", "manager"))


@pytest.mark.parametrize(("source", "target"), list(needed()))
def test_what_calls_what_may(manifests: Manifests, source: str, target: str) -> None:
    assert passes(manifests, labels(manifests, source), labels(manifests, target), PORTS[target])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tokenizer", "pool-default"),
        ("manager", "pool-default"),
        ("manager", "tokenizer"),
        ("pool-a10", "pool-default"),
    ],
)
def test_what_does_not_call_may_not(manifests: Manifests, source: str, target: str) -> None:
    assert not passes(manifests, labels(manifests, source), labels(manifests, target), PORTS[target])


@pytest.mark.parametrize("target", ["pool-default", "tokenizer", "manager"])
def test_others_of_the_namespace_call_only_as_clients(manifests: Manifests, target: str) -> None:
    stranger, client = {"app": "web"}, {"app": "web", "modelfleet.dev/client": "true"}

    assert not passes(manifests, stranger, labels(manifests, target), PORTS[target])
    assert passes(manifests, client, labels(manifests, target), PORTS[target])
    assert passes(manifests, stranger, labels(manifests, target), PORTS[target] + 1000), "metrics are for anyone"


@pytest.mark.parametrize("source", ["pool-default", "tokenizer", "manager"])
def test_every_service_may_ask_for_names(manifests: Manifests, source: str) -> None:
    assert passes(manifests, labels(manifests, source), {"k8s-app": "kube-dns"}, 53)


@pytest.mark.parametrize(("source", "free"), [("pool-default", False), ("tokenizer", False), ("manager", True)])
def test_only_the_manager_reaches_the_kubernetes_api_databases_and_stores(
    manifests: Manifests, source: str, *, free: bool
) -> None:
    assert passes(manifests, labels(manifests, source), {"somewhere": "else"}, 443) is free
