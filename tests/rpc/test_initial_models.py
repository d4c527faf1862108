"""What the chart's Job of initial models does to a manager."""

import asyncio
import json
import os
import socket
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import Iterator, Mapping
from pathlib import Path

import obstore
import pytest
from harness.hub import serving_hub
from harness.manager import Manager, running_manager
from harness.s3 import S3
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet_tools.check_model import write_check_model
from obstore.store import from_url

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_check_model(folder)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """The variables by which the hub's client finds one that has `org/check` and `org/weights`."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    several = {f"onnx/{name}.onnx": files["model.onnx"] for name in ("small", "large")}
    del files["model.onnx"]
    repositories = {
        "org/check": {**files, "onnx/model.onnx": several["onnx/small.onnx"], "model.safetensors": b"weights"},
        "org/several": {**files, **several},
        "org/weights": {**files, "model.safetensors": b"weights"},
    }
    with serving_hub(repositories) as (url, _):
        yield {"HF_ENDPOINT": url, "HF_HOME": str(folder.parent / "hub"), "HF_HUB_DISABLE_XET": "1"}


async def run_job(
    address: str, *models: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run the Job's process and return its exit code and what it told."""
    variables = {"MODELFLEET_MANAGER": address, "MODELFLEET_INITIAL_MODELS": json.dumps(models)}
    command = (sys.executable, "-m", "modelfleet_tools.initial_models")
    process = await create_subprocess_exec(
        *command, env={**os.environ, **variables, **(environment or {})}, stderr=PIPE
    )
    async with asyncio.timeout(60):
        _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


async def aliases(manager: Manager, model: str) -> dict[str, int]:
    models = (await manager.models.ListModels(pb.ListModelsRequest())).models
    return {alias.alias: alias.model_version for one in models if one.model == model for alias in one.aliases}


async def test_a_bad_model_does_not_stop_the_others(tmp_path: Path, folder: Path) -> None:
    good = {"name": "good", "alias": "stable", "source": str(folder)}
    bad = {"name": "bad", "alias": "stable", "source": str(tmp_path / "nothing")}

    async with running_manager(tmp_path / "data") as manager:
        code, told = await run_job(manager.address, bad, good)

        assert code == 1
        assert "Error: bad from" in told
        assert await aliases(manager, "good") == {"stable": 1}


async def test_an_upgrade_leaves_aliases_that_a_rollout_has_moved_and_fetches_nothing(
    tmp_path: Path, folder: Path
) -> None:
    model = {"name": "m", "alias": "stable", "source": str(folder)}

    async with running_manager(tmp_path / "data") as manager:
        assert (await run_job(manager.address, model))[0] == 0
        (folder / "LICENSE").write_text("another version")
        assert (await run_job(manager.address, {**model, "alias": "canary"}))[0] == 0
        await manager.models.SetAlias(pb.SetAliasRequest(model="m", alias="stable", model_version=2))

        code, told = await run_job(manager.address, {**model, "source": "s3://gone/for/good"})

        assert code == 0
        assert "m@stable is there already: version 2" in told
        assert await aliases(manager, "m") == {"canary": 2, "stable": 2}


async def test_a_model_is_placed_on_the_pools_that_it_names(tmp_path: Path, folder: Path) -> None:
    async with running_manager(tmp_path / "data") as manager:
        model = {"name": "m", "alias": "stable", "source": str(folder), "pools": ["large"]}

        assert (await run_job(manager.address, model))[0] == 0

        (found,) = (await manager.models.ListModels(pb.ListModelsRequest())).models
        assert list(found.pools) == ["large"]


async def test_it_waits_for_a_manager_that_is_still_being_started(tmp_path: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "MODELFLEET_MANAGER": f"127.0.0.1:{port}",
        "MODELFLEET_INITIAL_MODELS": json.dumps([{"name": "m", "alias": "stable", "source": str(folder)}]),
    }
    job = await create_subprocess_exec(
        *(sys.executable, "-m", "modelfleet_tools.initial_models"), env={**os.environ, **variables}, stderr=PIPE
    )
    assert job.stderr
    assert b"Waiting for the manager" in await job.stderr.readline()

    async with running_manager(tmp_path / "data", port=port) as manager, asyncio.timeout(60):
        await job.communicate()

        assert job.returncode == 0
        assert await aliases(manager, "m") == {"stable": 1}


@pytest.mark.parametrize(
    "model", [{"source": "hf://org/check@v1"}, {"source": "hf://org/several", "graph": "onnx/large.onnx"}]
)
async def test_models_come_from_the_hub(tmp_path: Path, hub: dict[str, str], model: dict[str, str]) -> None:
    async with running_manager(tmp_path / "data") as manager:
        code, told = await run_job(manager.address, {"name": "m", "alias": "stable", **model}, environment=hub)

        assert code == 0, told
        version = (await manager.models.GetModelVersion(pb.GetModelVersionRequest(model="m"))).model_version
        graph = model.get("graph", "onnx/model.onnx")
        assert {file.path for file in version.files} == {graph, "tokenizer.json"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("hf://org/weights", "org/weights has weights and no ONNX graph. Run `modelfleet import`"),
        ("hf://org/several", "has several graphs: onnx/large.onnx, onnx/small.onnx"),
        ("hf://org/none", "The hub has no model org/none"),
        ("ftp://org/none", "is no source. Give a folder, hf://org/name or s3://bucket/prefix"),
    ],
)
async def test_what_cannot_be_had_is_told_of(tmp_path: Path, hub: dict[str, str], source: str, sentence: str) -> None:
    async with running_manager(tmp_path / "data") as manager:
        model = {"name": "m", "alias": "stable", "source": source}
        code, told = await run_job(manager.address, model, environment=hub)

        assert code == 1
        assert sentence in told
        assert await aliases(manager, "m") == {}


async def test_models_come_from_a_bucket(tmp_path: Path, folder: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    url = s3.new_bucket().url
    store = from_url(url, client_options={"allow_http": True})
    for path in folder.iterdir():
        obstore.put(store, f"deep/{path.name}", path)
    full, empty = ({"name": name, "alias": "stable", "source": f"{url}/{name}"} for name in ("deep", "empty"))

    async with running_manager(tmp_path / "data") as manager:
        code, told = await run_job(manager.address, empty, full)

        assert code == 1
        assert f"There is nothing below {url}/empty" in told
        assert await aliases(manager, "deep") == {"stable": 1}


async def test_a_bucket_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, folder: Path, s3: S3) -> None:
    unreadable = {"name": "bucket", "alias": "stable", "source": "s3://tests/some/prefix"}
    good = {"name": "good", "alias": "stable", "source": str(folder)}
    environment = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}

    async with running_manager(tmp_path / "data") as manager:
        code, told = await run_job(manager.address, unreadable, good, environment=environment)

        assert code == 1
        assert "Error: bucket from s3://tests/some/prefix: The bucket cannot be read" in told
        assert await aliases(manager, "good") == {"stable": 1}
