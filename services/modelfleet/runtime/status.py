"""From errors to gRPC statuses: one table, and the `google.rpc` details that go with each code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from modelfleet.runtime.errors import ModelfleetError, Reason

ERROR_DOMAIN = "modelfleet"
# The message travels three times, as text of up to 3 bytes a byte and in base64. Callers take 8 KB of it all, and show
# an error of their own where it is more.
_LONGEST_MESSAGE_BYTES = 1024
# Each takes some 30 bytes of the same 8 KB.
_MOST_FIELDS = 64

CODES: Mapping[Reason, grpc.StatusCode] = MappingProxyType(
    {
        Reason.INVALID_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.WRONG_TASK: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.INVALID_BUNDLE: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.MODEL_VERSION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.ALIAS_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.BLOB_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.POOL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.ROLLOUT_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.TOKENIZER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.NOT_SERVED_HERE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.STATE_CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.PROVIDER_UNAVAILABLE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.GOLDEN_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.INSUFFICIENT_MEMORY: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.FATAL_DEVICE: grpc.StatusCode.UNAVAILABLE,
        Reason.MODEL_LOADING: grpc.StatusCode.UNAVAILABLE,
        Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
        Reason.MANAGER_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.TOKENIZER_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.KUBERNETES_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.STORAGE_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.STORAGE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.DEADLINE_EXPIRED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.DIGEST_MISMATCH: grpc.StatusCode.DATA_LOSS,
        Reason.SESSION_FAILURE: grpc.StatusCode.INTERNAL,
        Reason.NOT_FINITE: grpc.StatusCode.INTERNAL,
        Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)


def to_status(error: ModelfleetError, request_id: str) -> grpc.Status:
    """Return the status that tells a caller of `error`: code, message, ErrorInfo, and RetryInfo or BadRequest."""
    code = CODES[error.reason]
    message = _bounded(error.message)
    details: list[any_pb2.Any] = [
        _packed(
            error_details_pb2.ErrorInfo(
                reason=error.reason.value, domain=ERROR_DOMAIN, metadata={"request_id": request_id}
            )
        )
    ]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    if error.field is not None or code is grpc.StatusCode.INVALID_ARGUMENT:
        details.append(_packed(_bad_request(error, message)))
    status = status_pb2.Status(code=code.value[0], message=message, details=details)
    return cast("grpc.Status", rpc_status.to_status(status))


def pushback(error: ModelfleetError) -> tuple[tuple[str, str], ...]:
    """Return trailing metadata that delays the retries which gRPC clients make by themselves (gRFC A6)."""
    if error.retry_after_s is None:
        return ()
    return (("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1000))),)


def _bad_request(error: ModelfleetError, message: str) -> error_details_pb2.BadRequest:
    fields = error.fields[:_MOST_FIELDS] or ("",)
    violations = [error_details_pb2.BadRequest.FieldViolation(field=field) for field in fields]
    violations[0].description = message
    return error_details_pb2.BadRequest(field_violations=violations)


def _bounded(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _LONGEST_MESSAGE_BYTES:
        return message
    return encoded[: _LONGEST_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
