"""`modelfleet check`, which `helm test` runs."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from e2e.conftest import Serving
from harness.kubernetes_api import Failure, Json, KubernetesApi, running_api, write_kubeconfig
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.slow

SELECTOR = "app.kubernetes.io/component=tokenizer"
EVICTION_RULES = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
    {"apiGroups": [""], "resources": ["pods/eviction"], "verbs": ["create"]},
]


def run(serving: Serving, *arguments: str) -> Result:
    addresses = serving.cluster.addresses
    environment = {
        "MODELFLEET_INFERENCE": addresses.inference,
        "MODELFLEET_TOKENIZER": addresses.tokenizer,
        "MODELFLEET_MANAGER": addresses.manager,
    }
    return CliRunner().invoke(app, ["check", *arguments], env=environment)


def test_a_cluster_that_serves_is_well_and_left_as_it_was(serving: Serving) -> None:
    result = run(serving, "--device", "cpu", "--json")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["provider"] == "CPUExecutionProvider"
    assert {model.model for model in serving.client.models() if model.aliases} == {"minilm", "pii"}


def test_answers_from_another_device_are_an_error(serving: Serving) -> None:
    result = run(serving, "--device", "cuda")

    assert result.exit_code == 1
    assert "answers on CPUExecutionProvider, not on CUDAExecutionProvider" in result.output


def test_each_worker_of_a_pool_must_serve_on_its_device(serving: Serving) -> None:
    (pool,) = serving.client.pools()

    well = run(serving, "--pool", f"{pool.pool}=cpu")
    wrong = run(serving, "--pool", f"{pool.pool}=cuda")
    unknown = run(serving, "--pool", "a10=cpu")

    assert well.exit_code == 0, well.output
    assert f"Pool {pool.pool}: {pool.desired_replicas} ready workers serve on CPUExecutionProvider." in well.output
    assert wrong.exit_code == 1
    assert "answers on CPUExecutionProvider, not on CUDAExecutionProvider" in wrong.output
    assert unknown.exit_code == 4
    assert "There is no pool 'a10'" in unknown.output


def test_an_unknown_device_is_wrong_usage(serving: Serving) -> None:
    result = run(serving, "--pool", "default")

    assert result.exit_code == 2
    assert "--pool has the device ''" in result.output


def test_a_cluster_that_is_not_there_is_an_error(serving: Serving) -> None:
    result = run(serving, "--manager", "localhost:1", "--timeout", "1")

    assert result.exit_code == 3
    assert "localhost:1 is not healthy" in result.output


def pod(name: str) -> Json:
    labels = dict([SELECTOR.split("=")])
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "tokenizer", "image": "t"}]},
        "status": {},
    }


async def drain(serving: Serving, api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    kubeconfig = str(write_kubeconfig(tmp_path / "kubeconfig", api.port))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", kubeconfig)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", kubeconfig)
    return await asyncio.to_thread(run, serving, "--evict", SELECTOR, "--json")


async def test_a_pod_is_drained_under_requests_once_its_budget_allows_it(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_api(EVICTION_RULES) as api:
        await api.put("pods", pod("tokenizer-a"))
        await api.put("pods", pod("tokenizer-b"))
        api.fail("create pods/eviction", Failure(429))

        result = await drain(serving, api, tmp_path, monkeypatch)

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["evicted_pod"] == "tokenizer-a"
    assert report["requests_during_drain"] > 0
    assert api.seen("create", "pods/eviction") == 2


async def test_the_only_pod_is_not_evicted(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_api(EVICTION_RULES) as api:
        await api.put("pods", pod("tokenizer-a"))

        result = await drain(serving, api, tmp_path, monkeypatch)

    assert result.exit_code == 1
    assert "finds 1 pods" in result.output
    assert not api.seen("create", "pods/eviction")


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("list pods", 401, "Pods cannot be listed: 401.*renew them"),
        ("list pods", 403, "Pods cannot be listed: 403.*`list` on pods"),
        ("create pods/eviction", 401, "tokenizer-a cannot be evicted: 401.*renew them"),
    ],
)
async def test_credentials_that_do_not_do_have_a_remedy(  # noqa: PLR0917  fixtures and what varies
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, status: int, message: str
) -> None:
    async with running_api(EVICTION_RULES) as api:
        await api.put("pods", pod("tokenizer-a"))
        await api.put("pods", pod("tokenizer-b"))
        api.fail(call, Failure(status))

        result = await drain(serving, api, tmp_path, monkeypatch)

    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split())), result.output


def test_without_a_cluster_to_ask_the_check_says_so_in_one_sentence(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library prints that "this might not work" wherever there is no kubeconfig, in a pod that needs none, too."""
    missing = str(tmp_path / "none")
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", missing)

    result = run(serving, "--evict", SELECTOR)

    assert result.exit_code == 1
    assert "No Kubernetes API is known" in result.output
    assert "kube_config_path" not in result.output
