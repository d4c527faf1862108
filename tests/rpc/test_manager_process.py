"""The manager as a process: how it ends, and what a kill leaves."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import grpc
import pytest
from harness.manager import Files, Manager, chunks, connected, header, push, sha256
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1 import worker_service_pb2 as workers_pb
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime.errors import Reason

pytestmark = pytest.mark.slow
MIB = 1 << 20


@asynccontextmanager
async def process(data_dir: Path, *flags: str) -> AsyncIterator[tuple[Process, Manager]]:
    command = [sys.executable, "-m", "modelfleet.manager", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    child = await create_subprocess_exec(*command, "--data-dir", str(data_dir), *flags, stderr=PIPE)
    try:
        async with asyncio.timeout(30):
            while (entry := json.loads(await child.stderr.readline()))["event"] != "listening":
                pass
        async with connected(f"127.0.0.1:{entry['port']}", data_dir) as manager:
            yield child, manager
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


async def content(manager: Manager, digest: str) -> bytes:
    call = manager.models.DownloadBlob(pb.DownloadBlobRequest(sha256=digest))
    return b"".join([response.data async for response in call])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_it_at_once_with_exit_code_0_although_workers_watch(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with process(tmp_path, "--drain-delay-s", "0") as (child, manager):
        call = manager.workers.WatchAssignments(workers_pb.WatchAssignmentsRequest(worker="w", pool="p"))
        await call.read()

        child.send_signal(number)
        started = time.monotonic()

        assert await child.wait() == 0
        assert time.monotonic() - started < 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).reason is Reason.DRAINING


async def test_kill_in_the_middle_of_a_push_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged: Files = {"model.onnx": b"first" * MIB}
    graph, weights = b"second" * MIB, bytes(range(256)) * (30 * MIB // 256)
    cut: Files = {"model.onnx": graph, "weights.bin": weights}

    async with process(tmp_path) as (child, manager):
        first = await push(manager, "pii", acknowledged, alias="stable")
        call = manager.models.PushModelVersion()
        for part in (header("pii", cut, alias="stable"), *chunks(graph), *list(chunks(weights))[:25]):
            await call.write(part)
        partial = f"{sha256(weights)}#*"
        async with asyncio.timeout(10):
            while not await asyncio.to_thread(lambda: list(tmp_path.rglob(partial))):
                pass
        child.kill()
        await child.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    async with process(tmp_path) as (_, manager):
        resolved = await manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii"))
        assert resolved.model_version == first.model_version
        assert await content(manager, sha256(acknowledged["model.onnx"])) == acknowledged["model.onnx"]
        asked = pb.FindMissingBlobsRequest(sha256=[sha256(graph), sha256(weights)])
        assert list((await manager.models.FindMissingBlobs(asked)).missing_sha256) == [sha256(weights)]

        resumed = await push(manager, "pii", cut, alias="stable")

        assert resumed.model_version.model_version == 2
        assert await content(manager, sha256(weights)) == weights


async def test_every_push_that_was_answered_is_there_after_kills(tmp_path: Path) -> None:
    answered: dict[bytes, int] = {}

    async def push_until_killed(manager: Manager, pusher: int, least: int, enough: asyncio.Event) -> None:
        with suppress(grpc.aio.AioRpcError):
            for number in range(10_000):
                graph = f"{manager.address} {pusher} {number}".encode()
                response = await push(manager, "pii", {"model.onnx": graph}, alias="stable")
                answered[graph] = response.model_version.model_version
                if len(answered) >= least:
                    enough.set()

    for least in (5, 20, 60):
        async with process(tmp_path) as (child, manager):
            enough = asyncio.Event()
            pushers = [asyncio.create_task(push_until_killed(manager, n, least, enough)) for n in range(4)]
            async with asyncio.timeout(30):
                await enough.wait()
            child.kill()
            await asyncio.gather(*pushers)

    async with process(tmp_path) as (_, manager):
        assert len(set(answered.values())) == len(answered)
        for graph, number in answered.items():
            found = await manager.models.GetModelVersion(pb.GetModelVersionRequest(model=f"pii@{number}"))
            assert found.model_version.files[0].sha256 == sha256(graph)
            assert await content(manager, sha256(graph)) == graph
    with closing(sqlite3.connect(tmp_path / "manager.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_wrong_flag_is_explained_and_ends_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "modelfleet.manager", "--port", "70000"]
    child = await create_subprocess_exec(*command, stderr=PIPE)
    _, told = await child.communicate()
    assert child.returncode == 2
    assert b"--port (or MODELFLEET_PORT) is '70000'" in told


async def test_without_a_kubernetes_api_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelfleet.manager", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
    child = await create_subprocess_exec(
        *(*command, "--data-dir", str(tmp_path), "--pools", "kubernetes"),
        env={**environment, "HOME": str(tmp_path)},
        stderr=PIPE,
    )

    async with asyncio.timeout(30):
        _, told = await child.communicate()

    assert child.returncode == 1
    *_, sentence = told.decode().splitlines()
    assert sentence.startswith(
        "The manager cannot start: no Kubernetes API is known: there is neither a ServiceAccount's"
    )
