"""From gRPC statuses back to the errors that the services raised."""

import re
from collections.abc import Iterable, Iterator
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError

# gRPC's own words, in both directions, where it has the code of an overload: no retry will pass.
_TOO_LARGE = re.compile(r"message larger than max|metadata size exceeds")
_STATUS_DETAILS = "grpc-status-details-bin"

# What a status means that no modelfleet service wrote, such as gRPC's own "connection refused".
_BARE_CODES: dict[grpc.StatusCode, type[ModelfleetError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExpiredError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInputError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.StateConflictError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnknownCallError,
    grpc.StatusCode.CANCELLED: errors.CallCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
}
# What follows "The <service> service at <target>", by the class of the error that no service wrote.
_SAID: dict[type[ModelfleetError], str] = {
    errors.UnavailableError: "cannot be reached: {message}. Start it, or say where it is with {setting}.",
    errors.DeadlineExpiredError: "did not answer in time. Allow it more, or send less at once.",
    errors.UnknownCallError: (
        "does not know this call: {message}. Is another service there, or an older release? Say where the right one is "
        "with {setting}."
    ),
    errors.CallCancelledError: "cancelled the call, or a proxy before it did: {message}. Call again.",
    errors.UnauthenticatedError: "does not know who calls: {message}. Give the credentials that it asks for.",
    errors.PermissionDeniedError: "does not allow this call: {message}. Ask those who run it for the permission.",
}


def from_rpc_error(error: grpc.RpcError) -> ModelfleetError:
    """
    Return the error that a failed call tells of.

    Its class is the one that the service raised, known by ErrorInfo.reason, or else the nearest to the status code.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    details = _details(error)
    info = next((detail for detail in details if isinstance(detail, error_details_pb2.ErrorInfo)), None)
    kind = _BY_REASON.get(info.reason) if info else None
    if not info and code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE.search(message):
        return errors.InvalidInputError(f"{message.rstrip('.')}. Send less at once, or let both sides take more.")
    translated = (kind or _BARE_CODES.get(code, errors.InternalError))(message)
    if info:
        translated.request_id = info.metadata.get("request_id")
    for detail in details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            translated.retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
        elif isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            translated.fields = tuple(violation.field for violation in detail.field_violations if violation.field)
    return translated


def from_call(error: grpc.RpcError, service: str, target: str) -> ModelfleetError:
    """Return `from_rpc_error`'s error; where no service wrote the status, its message says who did not answer."""
    translated = from_rpc_error(error)
    if translated.request_id:
        return translated
    form = _SAID.get(type(translated), f"answered {error.code().name}: {{message}}.")
    said = form.format(message=translated.message.rstrip("."), setting=f"MODELFLEET_{service.upper()}")
    told = type(translated)(f"The {service} service at {target} {said}", fields=translated.fields)
    told.retry_after_s = translated.retry_after_s
    return told


def _details(error: grpc.RpcError) -> list[object]:
    found: list[object] = []
    metadata = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key == _STATUS_DETAILS:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:  # a proxy's own; the code and the message still tell
                continue
            for packed in status.details:
                for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
                    if packed.Is(kind.DESCRIPTOR):
                        unpacked = kind()
                        packed.Unpack(unpacked)
                        found.append(unpacked)
    return found


def _subclasses(kind: type[ModelfleetError]) -> Iterator[type[ModelfleetError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _subclasses(subclass)


# A class that defines no reason of its own groups others and is never sent.
_BY_REASON = {kind.reason.value: kind for kind in _subclasses(ModelfleetError) if "reason" in vars(kind)}
