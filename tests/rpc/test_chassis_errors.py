import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import prometheus_client
import pytest
from harness.scripted import Scripted
from harness.serving import serving
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub, add_ModelServiceServicer_to_server
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError
from modelfleet.runtime.status import CODES
from modelfleet.runtime.telemetry import new_request_id

REQUEST_ID = (("x-request-id", "id-of-the-test"),)


def subclasses(kind: type[ModelfleetError]) -> Iterator[type[ModelfleetError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


RAISED = [kind for kind in subclasses(ModelfleetError) if "reason" in vars(kind)]


@asynccontextmanager
async def connected(scripted: Scripted, **settings: Any) -> AsyncIterator[ModelServiceStub]:
    """Serve what the test wrote, and call it without retries."""
    async with (
        serving(lambda server: add_ModelServiceServicer_to_server(scripted, server), **settings) as address,
        grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel,
    ):
        yield ModelServiceStub(channel)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def raising(error: BaseException) -> Any:
    async def answer(_request: object, _context: object) -> None:
        raise error

    return answer


@pytest.mark.parametrize("kind", RAISED)
async def test_an_error_arrives_as_the_class_that_was_raised(kind: type[ModelfleetError]) -> None:
    async with connected(Scripted(unary=raising(kind("What happened: 7. Do this.", field="part.of.it")))) as stub:
        failed = await failure(stub.GetModel(pb.GetModelRequest(), metadata=REQUEST_ID))

    arrived = from_rpc_error(failed)
    assert type(arrived) is kind
    assert failed.code() is CODES[kind.reason]
    assert (arrived.message, arrived.field) == ("What happened: 7. Do this.", "part.of.it")
    assert arrived.retry_after_s == kind.retry_after_s
    assert arrived.request_id == "id-of-the-test"


async def test_a_delay_that_the_error_sets_itself_arrives() -> None:
    error = errors.OverloadedError("Busy.")
    error.retry_after_s = 2.5
    async with connected(Scripted(unary=raising(error))) as stub:
        failed = await failure(stub.GetModel(pb.GetModelRequest()))

    assert from_rpc_error(failed).retry_after_s == 2.5
    assert ("grpc-retry-pushback-ms", "2500") in list(failed.trailing_metadata())


async def test_text_beyond_ascii_arrives_unharmed() -> None:
    async with connected(Scripted(unary=raising(errors.InvalidInputError("'中文 😀' no.\nNext.", field="é")))) as stub:
        arrived = from_rpc_error(await failure(stub.GetModel(pb.GetModelRequest())))

    assert (arrived.message, arrived.field) == ("'中文 😀' no.\nNext.", "é")


async def test_an_error_in_the_middle_of_a_response_stream_is_mapped() -> None:
    async def stream(_request: object, _context: object) -> AsyncIterator[pb.DownloadBlobResponse]:
        yield pb.DownloadBlobResponse(data=b"first")
        raise errors.DigestMismatchError("Wrong.")

    async with connected(Scripted(stream=stream)) as stub:
        call = stub.DownloadBlob(pb.DownloadBlobRequest())
        received = [(await call.read()).data]
        failed = await failure(call.read())

    assert received == [b"first"]
    assert type(from_rpc_error(failed)) is errors.DigestMismatchError


async def test_an_error_while_requests_stream_in_is_mapped() -> None:
    async def upload(requests: AsyncIterator[pb.PushModelVersionRequest], _context: object) -> None:
        async for request in requests:
            if request.chunk.data == b"bad":
                raise errors.InvalidInputError("Bad chunk.", field="chunk")

    async with connected(Scripted(upload=upload)) as stub:
        chunks = [pb.PushModelVersionRequest(chunk=pb.BlobChunk(data=data)) for data in (b"good", b"bad", b"good")]
        failed = await failure(stub.PushModelVersion(iter(chunks)))

    assert type(from_rpc_error(failed)) is errors.InvalidInputError


class PanicError(BaseException):
    """As Rust extensions raise: not an Exception."""


@pytest.mark.parametrize("unforeseen", [ZeroDivisionError("secret"), PanicError("secret")], ids=["exception", "panic"])
async def test_what_was_unforeseen_tells_the_caller_an_id_and_nothing_else(unforeseen: BaseException) -> None:
    async with connected(Scripted(unary=raising(unforeseen))) as stub:
        failed = await failure(stub.GetModel(pb.GetModelRequest(), metadata=REQUEST_ID, timeout=10))
        again = await failure(stub.GetModel(pb.GetModelRequest(), timeout=10))

    assert failed.code() is again.code() is grpc.StatusCode.INTERNAL
    arrived = from_rpc_error(failed)
    assert type(arrived) is errors.InternalError
    assert arrived.message == "Internal error. The server's log has it under request id id-of-the-test."
    assert arrived.request_id == "id-of-the-test"
    assert "secret" not in str(failed.trailing_metadata())


async def test_a_call_without_request_id_gets_one() -> None:
    async with connected(Scripted(unary=raising(errors.InternalError("x")))) as stub:
        ids = [from_rpc_error(await failure(stub.GetModel(pb.GetModelRequest()))).request_id for _ in range(2)]

    assert all(ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("given", ["", "two words", "A" * 513, "A" * 3000])
async def test_an_id_that_could_not_travel_on_is_replaced(given: str) -> None:
    async with connected(Scripted(unary=raising(errors.InternalError("x")))) as stub:
        call = stub.GetModel(pb.GetModelRequest(), metadata=(("x-request-id", given),))
        replaced = from_rpc_error(await failure(call)).request_id

    assert replaced
    assert replaced != given
    assert len(replaced) == len(new_request_id())


async def test_an_id_of_another_systems_making_is_kept() -> None:
    given = "Root=1-67891233/abc+def==:7," + "x" * 400
    async with connected(Scripted(unary=raising(errors.InternalError("x")))) as stub:
        call = stub.GetModel(pb.GetModelRequest(), metadata=(("x-request-id", given),))

        assert from_rpc_error(await failure(call)).request_id == given


@pytest.mark.parametrize("character", ["x", "中", "😀"])
async def test_a_long_message_is_cut_so_that_the_status_arrives(
    character: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors.InvalidInputError(character * 20_000, field="model")
    async with connected(Scripted(unary=raising(error))) as stub:
        failed = await failure(stub.GetModel(pb.GetModelRequest()))

    arrived = from_rpc_error(failed)
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (type(arrived), arrived.field) == (errors.InvalidInputError, "model")
    assert arrived.message == character * (1021 // len(character.encode())) + "..."
    assert character * 1022 not in capsys.readouterr().out


async def test_a_handler_that_aborts_by_itself_keeps_its_status() -> None:
    async def abort(_request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "mine")

    async with connected(Scripted(unary=abort)) as stub:
        failed = await failure(stub.GetModel(pb.GetModelRequest()))

    assert (failed.code(), failed.details()) == (grpc.StatusCode.ALREADY_EXISTS, "mine")


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(lambda _server: None) as address, grpc.aio.insecure_channel(address) as channel:
        failed = await failure(channel.unary_unary("/modelfleet.api.manager.v1.ModelService/Nothing")(b""))

    assert failed.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_call_too_many_is_refused_and_the_next_is_taken() -> None:
    started, release = asyncio.Semaphore(0), asyncio.Event()

    async def wait(_request: object, _context: object) -> pb.GetModelResponse:
        started.release()
        await release.wait()
        return pb.GetModelResponse()

    async with connected(Scripted(unary=wait), max_concurrent_calls=2) as stub:
        running = [stub.GetModel(pb.GetModelRequest()) for _ in range(2)]
        for _ in running:
            await started.acquire()
        failed = await failure(stub.GetModel(pb.GetModelRequest()))
        release.set()
        await asyncio.gather(*running)
        await stub.GetModel(pb.GetModelRequest())

    refused = from_rpc_error(failed)
    assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(refused) is errors.OverloadedError
    assert "2 calls under way" in refused.message
    assert refused.retry_after_s


async def test_a_caller_that_leaves_frees_its_place_and_cancels_the_work() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(_request: object, _context: object) -> pb.GetModelResponse:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return pb.GetModelResponse()

    scripted = Scripted(unary=wait)
    async with connected(scripted, max_concurrent_calls=1) as stub:
        call = stub.GetModel(pb.GetModelRequest())
        await started.wait()
        call.cancel()
        await cancelled.wait()
        scripted.unary = raising(errors.InternalError("taken"))
        assert (await failure(stub.GetModel(pb.GetModelRequest()))).details() == "taken"


@pytest.mark.parametrize(("timeout_s", "code"), [(0.1, "DEADLINE_EXCEEDED"), (60, "CANCELLED")])
async def test_a_call_that_outlasts_its_deadline_is_counted_apart_from_one_whose_caller_left(
    timeout_s: float, code: str
) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def wait(_request: object, _context: object) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def counted() -> float:
        labels = {"method": "/modelfleet.api.manager.v1.ModelService/GetModel", "code": code}
        return prometheus_client.REGISTRY.get_sample_value("modelfleet_rpc_seconds_count", labels) or 0.0

    before = counted()
    async with connected(Scripted(unary=wait)) as stub:
        call = stub.GetModel(pb.GetModelRequest(), timeout=timeout_s)
        await started.wait()
        if code == "CANCELLED":
            call.cancel()
        await ended.wait()

    assert counted() == before + 1


async def test_messages_above_the_limit_are_refused_in_both_directions() -> None:
    limit = 1 << 20

    async def large(request: pb.GetModelRequest, _context: object) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=pb.Model(model="x" * int(request.model[:9])))

    async with connected(Scripted(unary=large), max_message_bytes=limit) as stub:
        fits = await stub.GetModel(pb.GetModelRequest(model=f"{limit - 100:09}"))
        too_large_answer = await failure(stub.GetModel(pb.GetModelRequest(model=f"{limit:09}")))
        too_large_request = await failure(stub.GetModel(pb.GetModelRequest(model="0" * limit)))
        fits_again = await stub.GetModel(pb.GetModelRequest(model=f"{1:09}"))

    assert len(fits.model.model) == limit - 100
    assert too_large_answer.code() is too_large_request.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for failed in (too_large_answer, too_large_request):
        error = from_rpc_error(failed)
        assert type(error) is errors.InvalidInputError  # a retry would only fail again
        assert re.search(r"message larger than max .*\. Send less at once", error.message)
        assert error.retry_after_s is None
    assert fits_again.model.model == "x"


async def test_calls_that_outlast_the_drain_are_sent_elsewhere_and_not_just_cut_off() -> None:
    under_way, for_ever = asyncio.Event(), asyncio.Event()

    async def wait(_request: object, _context: object) -> None:
        under_way.set()
        await for_ever.wait()

    async def begin(_request: object, _context: object) -> AsyncIterator[pb.DownloadBlobResponse]:
        yield pb.DownloadBlobResponse(data=b"first")
        await for_ever.wait()

    scripted = Scripted(unary=wait, stream=begin)
    async with AsyncExitStack() as server:
        address = await server.enter_async_context(
            serving(lambda grpc_: add_ModelServiceServicer_to_server(scripted, grpc_), drain_timeout_s=0.1)
        )
        async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
            stub = ModelServiceStub(channel)
            stream = stub.DownloadBlob(pb.DownloadBlobRequest(sha256="x"), timeout=30)
            assert (await stream.read()).data == b"first"
            unary = asyncio.create_task(failure(stub.GetModel(pb.GetModelRequest(model="x"), timeout=30)))
            await under_way.wait()

            await server.aclose()  # drains

            refused = [await unary, await failure(stream.read())]
    for each in refused:
        error = from_rpc_error(each)
        assert isinstance(error, errors.DrainingError)
        assert error.message == "The server shut down before this call had ended. Retry on another replica."
        assert error.retry_after_s
