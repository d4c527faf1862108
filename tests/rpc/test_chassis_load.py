"""However much comes at once, every call is answered, or refused in words."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import grpc
import pytest
from harness.scripted import Scripted
from harness.serving import serving
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub, add_ModelServiceServicer_to_server
from modelfleet.client.channel import open_async_channel
from modelfleet.client.errors import from_rpc_error

BURST = 10_000


async def answer(request: pb.GetModelRequest, _context: object) -> pb.GetModelResponse:
    await asyncio.sleep(0)
    return pb.GetModelResponse(model=pb.Model(model=request.model))


@asynccontextmanager
async def serving_stub(**settings: object) -> AsyncIterator[ModelServiceStub]:
    def register(server: grpc.aio.Server) -> None:
        add_ModelServiceServicer_to_server(Scripted(unary=answer), server)

    async with serving(register, **settings) as address, open_async_channel(address, attempts=1) as channel:
        yield ModelServiceStub(channel)


async def said(call: grpc.aio.UnaryUnaryCall) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {from_rpc_error(error).reason}"
    return "answered"


@pytest.mark.slow
async def test_each_call_of_a_burst_is_answered_or_refused_in_words() -> None:
    """By default gRPC drops calls beyond 1,000 that wait for the event loop, with CANCELLED and without a word."""
    async with serving_stub(max_concurrent_calls=16) as stub:
        calls = (stub.GetModel(pb.GetModelRequest(model="m"), timeout=60) for _ in range(BURST))
        outcomes = Counter(await asyncio.gather(*map(said, calls)))
        after = await stub.GetModel(pb.GetModelRequest(model="after"))

    assert outcomes.keys() <= {"answered", "RESOURCE_EXHAUSTED: OVERLOADED"}, outcomes
    assert outcomes.total() == BURST
    assert outcomes["answered"]
    assert after.model.model == "after"


def header(size: int) -> Iterable[tuple[str, str]]:
    return (("x-note", "a" * size),)


async def test_metadata_is_taken_up_to_the_limit_that_is_set() -> None:
    async with serving_stub(max_metadata_bytes=64 << 10) as stub:
        taken = await stub.GetModel(pb.GetModelRequest(model="m"), metadata=header(50_000))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModel(pb.GetModelRequest(model="m"), metadata=header(80_000))
        after = await stub.GetModel(pb.GetModelRequest(model="m"))

    assert taken.model.model == "m"
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "metadata size exceeds" in refused.value.details()
    assert after.model.model == "m"
