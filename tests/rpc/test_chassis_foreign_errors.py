"""Statuses that no modelfleet service of today wrote: gRPC's own, a proxy's, a newer server's."""

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from harness.scripted import Scripted
from harness.serving import serving
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub, add_ModelServiceServicer_to_server
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError

DETAILS = "grpc-status-details-bin"


async def arrived(code: grpc.StatusCode, *metadata: tuple[str, bytes]) -> ModelfleetError:
    """The error that a client sees when a server ends a call with a status of its own making."""

    async def abort(_request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, "why", metadata)

    async with (
        serving(lambda server: add_ModelServiceServicer_to_server(Scripted(unary=abort), server)) as address,
        grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ModelServiceStub(channel).GetModel(pb.GetModelRequest())
    return from_rpc_error(raised.value)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExpiredError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidInputError),
        (grpc.StatusCode.NOT_FOUND, errors.NotFoundError),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.StateConflictError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.UnknownCallError),
        (grpc.StatusCode.CANCELLED, errors.CallCancelledError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.UnauthenticatedError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
async def test_a_status_without_details_becomes_the_class_nearest_to_its_code(
    code: grpc.StatusCode, kind: type[ModelfleetError]
) -> None:
    error = await arrived(code)

    assert type(error) is kind
    assert (error.message, error.request_id) == ("why", None)


async def test_a_reason_from_the_future_becomes_the_class_nearest_to_its_code() -> None:
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason="INVENTED", domain="modelfleet", metadata={"request_id": "7"}))
    status = status_pb2.Status(code=5, message="why", details=[packed])

    error = await arrived(grpc.StatusCode.NOT_FOUND, (DETAILS, status.SerializeToString()))

    assert type(error) is errors.NotFoundError
    assert error.request_id == "7"


async def test_details_that_do_not_parse_hide_nothing() -> None:
    error = await arrived(grpc.StatusCode.UNAVAILABLE, (DETAILS, b"\xff\xff\xff"))

    assert type(error) is errors.UnavailableError
    assert error.message == "why"


async def test_a_server_that_is_not_there_is_unavailable_and_worth_a_retry() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1", options=[("grpc.enable_retries", 0)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ModelServiceStub(channel).GetModel(pb.GetModelRequest())

    error = from_rpc_error(raised.value)
    assert type(error) is errors.UnavailableError
    assert error.retry_after_s


async def test_trailers_that_are_too_large_for_a_client_are_no_overload() -> None:
    error = await arrived(grpc.StatusCode.INTERNAL, (DETAILS, b"x" * 40_000))

    assert type(error) is errors.InvalidInputError
    assert "metadata size exceeds" in error.message
