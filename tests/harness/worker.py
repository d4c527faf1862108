"""An inference worker for tests, wired as in production, with the real tokenizer service and a manager that obeys."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2_grpc import HealthStub
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from modelfleet.api.manager.v1 import model_service_pb2
from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.api.manager.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from modelfleet.api.oip.v2 import open_inference_pb2 as oip
from modelfleet.api.oip.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelfleet.client.errors import from_rpc_error
from modelfleet.inference.__main__ import Settings, working
from modelfleet.runtime.errors import ModelfleetError, ModelNotFoundError
from modelfleet.tokenizer.__main__ import Settings as TokenizerSettings
from modelfleet.tokenizer.__main__ import tokenizing

from harness.assigning_manager import AssigningManager
from harness.graphs import SampleBundle
from harness.serving import serving, until_serving

_QUICK = {"host": "127.0.0.1", "port": 0, "drain_delay_s": 0, "drain_timeout_s": 2}
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class RegisteringManager(AssigningManager):
    """Knows the models in `registered` besides those it assigns, and sends blobs only while `may_send`."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: set[str] = set()
        self.may_send = asyncio.Event()
        self.may_send.set()

    async def GetModelVersion(  # noqa: N802  as in the contract
        self, request: model_service_pb2.GetModelVersionRequest, _context: object
    ) -> model_service_pb2.GetModelVersionResponse:
        if request.model.partition("@")[0] not in self.registered:
            raise ModelNotFoundError(f"No model {request.model!r} is registered.", field="model")
        return model_service_pb2.GetModelVersionResponse()

    async def DownloadBlob(  # noqa: N802  as in the contract
        self, request: Any, context: Any
    ) -> AsyncIterator[model_service_pb2.DownloadBlobResponse]:
        await self.may_send.wait()
        async for response in super().DownloadBlob(request, context):
            yield response


@dataclass(frozen=True)
class Worker:
    """A worker, stubs of its services, and the manager that it obeys."""

    address: str
    manager: RegisteringManager
    inference: InferenceServiceStub
    open_inference: GRPCInferenceServiceStub
    health: HealthStub

    async def serve(self, models: Mapping[str, SampleBundle]) -> None:
        """Have versions (`name@number`) loaded, with the alias `stable` for the highest number of each name."""
        aliases: dict[str, int] = {}
        for key in models:
            name, _, number = key.partition("@")
            aliases[name] = max(aliases.get(name, 0), int(number))
        await self.manager.assign(models, aliases)
        for key in models:
            await self.manager.reported(key, "READY")

    async def is_serving(self) -> None:
        """Return once health says so."""
        await until_serving(self.address)


@asynccontextmanager
async def running_manager() -> AsyncIterator[tuple[RegisteringManager, str]]:
    """Run a manager until the block ends; gives its address, too."""
    manager = RegisteringManager()

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(manager, server)
        add_ModelServiceServicer_to_server(manager, server)

    async with serving(register) as address:
        yield manager, address


@asynccontextmanager
async def running_tokenizer(manager: str, directory: Path, *, port: int = 0) -> AsyncIterator[str]:
    """Run the tokenizer service until the block ends; gives its address."""
    settings = {**_QUICK, "port": port, "manager": manager, "cache_dir": directory, "encoder_threads": 1}
    async with tokenizing(TokenizerSettings(**settings)) as server:
        await until_serving(f"127.0.0.1:{server.port}")
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def running_worker(directory: Path, *, tokenizer: str | None = None, **settings: object) -> AsyncIterator[Worker]:
    """Run a worker and all that it needs until the block ends; `tokenizer` is the address of one that runs already."""
    async with AsyncExitStack() as stack:
        manager, address = await stack.enter_async_context(running_manager())
        if tokenizer is None:
            tokenizer = await stack.enter_async_context(running_tokenizer(address, directory / "tokenizers"))
        own = {"manager": address, "tokenizer": tokenizer, "cache_dir": directory / "cache", "threads": 1}
        server = await stack.enter_async_context(
            working(Settings(**{**_QUICK, **own, "canary_interval_s": 0, **settings}))
        )
        own_address = f"127.0.0.1:{server.port}"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(own_address))
        yield Worker(
            own_address,
            manager,
            InferenceServiceStub(channel),
            GRPCInferenceServiceStub(channel),
            HealthStub(channel),
        )


async def refused(
    worker: Worker, call: Awaitable[object], code: grpc.StatusCode, message: str, *, field: str | None = None
) -> ModelfleetError:
    """Check that a call is refused, why, with what the code calls for, and that the worker still serves."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    error = from_rpc_error(caught.value)
    assert re.search(message, error.message), error.message
    assert error.request_id
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        assert error.field == field
    assert bool(error.retry_after_s) is (code in _RETRIED)
    request = oip.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
    answer = await worker.open_inference.ModelInfer(request, timeout=10)
    assert list(answer.outputs[0].contents.fp32_contents) == [3, 5, 7]
    return error


async def still_embeds(worker: Worker) -> None:
    """Check that texts are still answered, too."""
    answer = await worker.inference.Embed(pb.EmbedRequest(model="embedder", texts=["the cat"]), timeout=10)
    assert answer.dimensions > 0
