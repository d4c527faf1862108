"""
Everything that modelfleet raises on purpose, on servers and in the client alike.

ModelfleetError
├── InvalidInputError            the request cannot be answered as it is
│   └── WrongTaskError           the model answers another task
├── InvalidBundleError           the files cannot be a model version
├── NotFoundError
│   ├── ModelNotFoundError
│   ├── ModelVersionNotFoundError
│   ├── AliasNotFoundError
│   ├── BlobNotFoundError
│   ├── PoolNotFoundError
│   ├── RolloutNotFoundError
│   └── TokenizerNotFoundError
├── StateConflictError           the operation does not fit the state of its object
├── NotServedHereError           registered, but not on this worker
├── ProviderUnavailableError     an execution provider that was asked for is not there
├── GoldenMismatchError          a version's outputs are not those recorded with it
├── InsufficientMemoryError      a version does not fit beside what is loaded
├── UnavailableError             worth a retry
│   ├── ModelLoadingError
│   ├── DrainingError
│   ├── FatalDeviceError         the device must be started again
│   ├── ManagerUnreachableError
│   ├── TokenizerUnreachableError
│   ├── KubernetesUnreachableError
│   └── StorageUnreachableError
├── OverloadedError              queue full, or too many calls
├── StorageFullError             no room for more models
├── DeadlineExpiredError         dropped while it waited
├── DigestMismatchError          bytes do not have the hash announced for them
├── SessionFailureError          a session failed while it ran the model
├── NotFiniteError               the model answered with what is not a number, or infinite
├── UnknownCallError             the server has no such call (raised by the client)
├── CallCancelledError           the call was cancelled on its way (raised by the client)
├── UnauthenticatedError         the server does not know the caller (raised by the client)
├── PermissionDeniedError        the caller may not do this (raised by the client)
└── InternalError                anything unforeseen

Only the standard library is imported here: the bare client and the domain code share this file.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

_QUOTED_CHARACTERS = 80
_ELEMENT = re.compile(r"[a-z_]+\[(\d+)\]")


def quoted(value: str) -> str:
    """Return what a caller sent as a message may repeat it: of a long text, which may be private, the beginning."""
    return repr(value) if len(value) <= _QUOTED_CHARACTERS else repr(f"{value[:_QUOTED_CHARACTERS]}...")


class Reason(StrEnum):
    """Why a call failed: the values of `modelfleet.api.errors.v1.ErrorReason` without their prefix."""

    INVALID_INPUT = "INVALID_INPUT"
    WRONG_TASK = "WRONG_TASK"
    INVALID_BUNDLE = "INVALID_BUNDLE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_VERSION_NOT_FOUND = "MODEL_VERSION_NOT_FOUND"
    ALIAS_NOT_FOUND = "ALIAS_NOT_FOUND"
    BLOB_NOT_FOUND = "BLOB_NOT_FOUND"
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    ROLLOUT_NOT_FOUND = "ROLLOUT_NOT_FOUND"
    TOKENIZER_NOT_FOUND = "TOKENIZER_NOT_FOUND"
    NOT_SERVED_HERE = "NOT_SERVED_HERE"
    STATE_CONFLICT = "STATE_CONFLICT"
    MODEL_LOADING = "MODEL_LOADING"
    DRAINING = "DRAINING"
    MANAGER_UNREACHABLE = "MANAGER_UNREACHABLE"
    TOKENIZER_UNREACHABLE = "TOKENIZER_UNREACHABLE"
    KUBERNETES_UNREACHABLE = "KUBERNETES_UNREACHABLE"
    OVERLOADED = "OVERLOADED"
    DEADLINE_EXPIRED = "DEADLINE_EXPIRED"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    SESSION_FAILURE = "SESSION_FAILURE"
    NOT_FINITE = "NOT_FINITE"
    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    GOLDEN_MISMATCH = "GOLDEN_MISMATCH"
    INSUFFICIENT_MEMORY = "INSUFFICIENT_MEMORY"
    FATAL_DEVICE = "FATAL_DEVICE"
    STORAGE_FULL = "STORAGE_FULL"
    STORAGE_UNREACHABLE = "STORAGE_UNREACHABLE"
    INTERNAL = "INTERNAL"


class ModelfleetError(Exception):
    """
    The base of all errors.

    `message` is one or two sentences for the caller: what happened, the value, what to do. `fields` name the parts of
    the request at fault, elements of a list as `texts[3]`; where they are elements, the others can be answered without
    them. `retry_after_s` is set where a retry is worth while. `request_id` is set in the client only.
    """

    reason: ClassVar[Reason] = Reason.INTERNAL
    retry_after_s: float | None = None
    request_id: str | None = None

    def __init__(self, message: str, *, field: str | None = None, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.fields = tuple(fields) or ((field,) if field else ())

    @property
    def field(self) -> str | None:
        """The first part of the request at fault."""
        return self.fields[0] if self.fields else None

    @property
    def indexes(self) -> tuple[int, ...]:
        """Which elements of the caller's list are at fault, as far as they were found."""
        matches = (_ELEMENT.fullmatch(field) for field in self.fields)
        return tuple(int(match[1]) for match in matches if match)


class InvalidInputError(ModelfleetError):
    """The request cannot be answered as it is."""

    reason = Reason.INVALID_INPUT


class WrongTaskError(InvalidInputError):
    """The model answers another task than the one that was called."""

    reason = Reason.WRONG_TASK


class InvalidBundleError(ModelfleetError):
    """The files cannot be a model version."""

    reason = Reason.INVALID_BUNDLE


class NotFoundError(ModelfleetError):
    """Something that the request names does not exist."""


class ModelNotFoundError(NotFoundError):
    """No model of this name is registered."""

    reason = Reason.MODEL_NOT_FOUND


class ModelVersionNotFoundError(NotFoundError):
    """The model has no version of this number."""

    reason = Reason.MODEL_VERSION_NOT_FOUND


class AliasNotFoundError(NotFoundError):
    """The model has no alias of this name."""

    reason = Reason.ALIAS_NOT_FOUND


class BlobNotFoundError(NotFoundError):
    """No blob of this digest is stored."""

    reason = Reason.BLOB_NOT_FOUND


class PoolNotFoundError(NotFoundError):
    """There is no pool of this name."""

    reason = Reason.POOL_NOT_FOUND


class RolloutNotFoundError(NotFoundError):
    """There is no rollout of this number."""

    reason = Reason.ROLLOUT_NOT_FOUND


class TokenizerNotFoundError(NotFoundError):
    """No tokenizer of this digest is known."""

    reason = Reason.TOKENIZER_NOT_FOUND


class StateConflictError(ModelfleetError):
    """The operation does not fit the state of its object."""

    reason = Reason.STATE_CONFLICT


class NotServedHereError(ModelfleetError):
    """The model is registered but this worker does not serve it."""

    reason = Reason.NOT_SERVED_HERE


class ProviderUnavailableError(ModelfleetError):
    """An execution provider that was asked for is not in this build or has no device."""

    reason = Reason.PROVIDER_UNAVAILABLE


class GoldenMismatchError(ModelfleetError):
    """A model version's outputs differ from its golden examples by more than is tolerated."""

    reason = Reason.GOLDEN_MISMATCH


class InsufficientMemoryError(ModelfleetError):
    """A model version does not fit into the memory that is left. Both figures are 0 where they are not known."""

    reason = Reason.INSUFFICIENT_MEMORY
    missing_host_bytes: int = 0
    missing_device_bytes: int = 0


class UnavailableError(ModelfleetError):
    """Not now; a retry after `retry_after_s` is worth while."""

    retry_after_s = 1.0


class ModelLoadingError(UnavailableError):
    """The model version is assigned to this worker but is not ready, or could not be loaded; that is tried again."""

    reason = Reason.MODEL_LOADING


class DrainingError(UnavailableError):
    """The server is shutting down."""

    reason = Reason.DRAINING
    retry_after_s = 0.1  # another replica answers at once


class FatalDeviceError(UnavailableError):
    """The device no longer works, and will not before the process is started again."""

    reason = Reason.FATAL_DEVICE
    retry_after_s = 0.1  # another replica answers at once


class ManagerUnreachableError(UnavailableError):
    """The manager cannot be reached."""

    reason = Reason.MANAGER_UNREACHABLE


class TokenizerUnreachableError(UnavailableError):
    """The tokenizer service cannot be reached."""

    reason = Reason.TOKENIZER_UNREACHABLE


class KubernetesUnreachableError(UnavailableError):
    """The manager cannot reach the Kubernetes API."""

    reason = Reason.KUBERNETES_UNREACHABLE


class StorageUnreachableError(UnavailableError):
    """The manager's database or blob store cannot be reached."""

    reason = Reason.STORAGE_UNREACHABLE


class OverloadedError(ModelfleetError):
    """A queue is full, or the server has as many calls under way as it allows."""

    reason = Reason.OVERLOADED
    retry_after_s = 0.2


class StorageFullError(ModelfleetError):
    """The disk or the quota of the manager's database or blobs is full."""

    reason = Reason.STORAGE_FULL


class DeadlineExpiredError(ModelfleetError):
    """The caller's deadline passed while the request waited."""

    reason = Reason.DEADLINE_EXPIRED


class DigestMismatchError(ModelfleetError):
    """Bytes do not have the SHA-256 that was announced for them."""

    reason = Reason.DIGEST_MISMATCH


class SessionFailureError(ModelfleetError):
    """A session failed while it ran the model."""

    reason = Reason.SESSION_FAILURE


class NotFiniteError(ModelfleetError):
    """The model answered an input with NaN or infinity, as narrow numbers do that overflow."""

    reason = Reason.NOT_FINITE


class UnknownCallError(ModelfleetError):
    """The server has no such call: it is another service, or of another release."""


class CallCancelledError(ModelfleetError):
    """The call was cancelled, by the server or on its way."""


class UnauthenticatedError(ModelfleetError):
    """The server, or a proxy before it, does not know the caller."""


class PermissionDeniedError(ModelfleetError):
    """The server, or a proxy before it, does not let the caller do this."""


class InternalError(ModelfleetError):
    """Anything unforeseen."""

    reason = Reason.INTERNAL
