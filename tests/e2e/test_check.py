"""`modelfleet check`, which `helm test` runs, and the pushes of the chart's initial models."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest
from e2e.conftest import Serving
from harness.kubernetes_api import Failure, Json, KubernetesApi, running_api, write_kubeconfig
from harness.s3 import S3
from modelfleet.client.answers import ServedModel
from modelfleet_tools import initial_models
from modelfleet_tools.__main__ import app
from modelfleet_tools.check_model import ANSWERS, TEXTS, write_check_model
from obstore.store import from_url
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


def push_initial(serving: Serving, monkeypatch: pytest.MonkeyPatch, *models: dict[str, str]) -> object:
    monkeypatch.setenv("MODELFLEET_MANAGER", serving.cluster.addresses.manager)
    monkeypatch.setenv("MODELFLEET_INITIAL_MODELS", json.dumps(models))
    with pytest.raises(SystemExit) as ended:
        initial_models.main()
    return ended.value.code


def served(serving: Serving, name: str) -> ServedModel:
    return serving.client.wait_until_served(name, timeout_s=60)


def test_initial_models_are_pushed_once_and_a_bad_one_does_not_stop_the_others(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_check_model(tmp_path)
    good = {"name": "initial", "alias": "stable", "source": str(tmp_path)}
    bad = {"name": "other", "alias": "stable", "source": str(tmp_path / "nothing")}

    assert push_initial(serving, monkeypatch, bad, good) == 1
    assert "no directory" in capsys.readouterr().err
    assert served(serving, "initial").model_version == 1
    assert serving.client.embed("initial", TEXTS).vectors == pytest.approx(ANSWERS)

    assert push_initial(serving, monkeypatch, good) == 0
    assert [version.model_version for version in serving.client.model_versions("initial")] == [1]
    serving.client.delete_alias("initial", "stable")
    serving.client.delete_model_version("initial", 1)


def test_initial_models_come_from_a_bucket(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    write_check_model(tmp_path)
    url = s3.new_bucket().url
    store = from_url(url, client_options={"allow_http": True})
    for path in tmp_path.iterdir():
        obstore.put(store, f"deep/{path.name}", path)

    assert push_initial(serving, monkeypatch, {"name": "bucket", "alias": "canary", "source": f"{url}/deep"}) == 0

    assert served(serving, "bucket@canary").task == "embed"
    serving.client.delete_alias("bucket", "canary")
    serving.client.delete_model_version("bucket", 1)


class Hub(SimpleHTTPRequestHandler):
    """As much of the Hugging Face hub as a download asks for."""

    commit = "a" * 40
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/check/revision/"):
            self.send(json.dumps({"id": "org/check", "sha": self.commit, "siblings": []}).encode(), body=body)
        elif path == f"/api/models/org/check/tree/{self.commit}":
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in self.folder.iterdir()
            ]
            # Not there to be fetched: weights for another runtime.
            tree.append({"type": "file", "path": "model.safetensors", "size": 1 << 40, "oid": "0" * 40})
            self.send(json.dumps(tree).encode(), body=body)
        else:
            self.send((self.folder / Path(path).name).read_bytes(), body=body)

    def send(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "hub"
    folder.mkdir()
    write_check_model(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Hub,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_initial_models_come_from_the_hub(serving: Serving, tmp_path: Path, hub: str) -> None:
    models = [{"name": "hub", "alias": "stable", "source": "hf://org/check@main"}]
    environment = {
        **os.environ,
        "MODELFLEET_MANAGER": serving.cluster.addresses.manager,
        "MODELFLEET_INITIAL_MODELS": json.dumps(models),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    command = [sys.executable, "-m", "modelfleet_tools.initial_models"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
    assert served(serving, "hub").task == "embed"
    serving.client.delete_alias("hub", "stable")
    serving.client.delete_model_version("hub", 1)
