"""A real manager for tests, on a free loopback port, and pushes of made-up bundles to it."""

import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub
from modelfleet.api.manager.v1.rollout_service_pb2_grpc import RolloutServiceStub
from modelfleet.api.manager.v1.storage_service_pb2_grpc import StorageServiceStub
from modelfleet.api.manager.v1.worker_service_pb2_grpc import WorkerServiceStub
from modelfleet.client.channel import open_async_channel
from modelfleet.client.errors import from_rpc_error
from modelfleet.manager.__main__ import Settings, managing
from modelfleet.runtime.errors import Reason

Files = Mapping[str, bytes]
TENSOR_MANIFEST = json.dumps({"task": "tensor", "model": "model.onnx"})


@dataclass(frozen=True)
class Manager:
    """Where a manager listens, what it keeps where, and stubs of its services."""

    address: str
    data_dir: Path
    models: ModelServiceStub
    workers: WorkerServiceStub
    rollouts: RolloutServiceStub
    storage: StorageServiceStub


@asynccontextmanager
async def running_manager(data_dir: Path, **changes: Any) -> AsyncIterator[Manager]:
    """Run a manager over a directory until the block ends; `changes` are made to quick settings."""
    settings = quick_settings(data_dir).model_copy(update=changes)
    async with managing(settings) as server, connected(f"127.0.0.1:{server.port}", data_dir) as manager:
        yield manager


def quick_settings(data_dir: Path) -> Settings:
    """Return settings for a manager on a free port that drains at once."""
    return Settings(host="127.0.0.1", port=0, data_dir=data_dir, drain_delay_s=0, drain_timeout_s=2)


@asynccontextmanager
async def connected(address: str, data_dir: Path) -> AsyncIterator[Manager]:
    """Give the stubs of a manager that runs already."""
    async with open_async_channel(address) as channel:
        stubs = (ModelServiceStub, WorkerServiceStub, RolloutServiceStub, StorageServiceStub)
        yield Manager(address, data_dir, *(stub(channel) for stub in stubs))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def header(model: str, files: Files, *, alias: str = "", manifest: str = TENSOR_MANIFEST) -> pb.PushModelVersionRequest:
    """Return the first message of a push."""
    described = [pb.BundleFile(path=path, sha256=sha256(content), size=len(content)) for path, content in files.items()]
    return pb.PushModelVersionRequest(
        header=pb.PushHeader(model=model, manifest_json=manifest, files=described, alias=alias)
    )


def chunks(content: bytes, *, size: int = 1 << 20, name: str = "") -> Iterator[pb.PushModelVersionRequest]:
    """Yield the chunks of a blob, named by its hash unless told otherwise."""
    name = name or sha256(content)
    for start in range(0, len(content), size):
        chunk = pb.BlobChunk(sha256=name, data=content[start : start + size])
        yield pb.PushModelVersionRequest(chunk=chunk)


async def push(manager: Manager, model: str, files: Files, *, alias: str = "") -> pb.PushModelVersionResponse:
    """Push a bundle as clients do: ask what is missing, send only that."""
    digests = [sha256(content) for content in files.values()]
    missing = (await manager.models.FindMissingBlobs(pb.FindMissingBlobsRequest(sha256=digests))).missing_sha256
    parts = [header(model, files, alias=alias)]
    for digest, content in dict(zip(digests, files.values(), strict=True)).items():
        if digest in missing:
            parts += chunks(content)
    return await manager.models.PushModelVersion(iter(parts))


async def refused(manager: Manager, call: Awaitable, code: grpc.StatusCode, reason: Reason, message: str) -> None:
    """Check that a call is refused, why, and that the manager still serves."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    error = from_rpc_error(caught.value)
    assert error.reason is reason
    assert re.search(message, error.message)
    await manager.models.ListModels(pb.ListModelsRequest())  # still serves
