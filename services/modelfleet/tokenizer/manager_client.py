"""The manager, as far as the tokenizer service needs it: blobs by digest, a model's tokenizer, what is assigned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING

import grpc
import structlog

from modelfleet.api.manager.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest
from modelfleet.bundle.reference import ModelReference
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime.errors import (
    BlobNotFoundError,
    DeadlineExpiredError,
    InvalidBundleError,
    ManagerUnreachableError,
    ModelfleetError,
    TokenizerNotFoundError,
    UnavailableError,
)
from modelfleet.runtime.telemetry import outgoing_metadata
from modelfleet.tokenizer.prefetching import Kind, NeededFile

if TYPE_CHECKING:
    ModelServiceStub = model_service_pb2_grpc.ModelServiceAsyncStub
    WorkerServiceStub = worker_service_pb2_grpc.WorkerServiceAsyncStub

_log = structlog.get_logger()

_RECONNECT_S = 0.5
_LAST_RECONNECT_S = 5.0


class ManagerClient:
    """Calls the manager on `channel`. A call may take `timeout_s`; a blob may have `max_bytes`."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, max_bytes: int) -> None:
        self._manager: ModelServiceStub = model_service_pb2_grpc.ModelServiceStub(channel)
        self._workers: WorkerServiceStub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    async def fetch(self, digest: str) -> bytes:
        """
        Return the content of a blob, not yet verified.

        Raises TokenizerNotFoundError, ManagerUnreachableError, or InvalidBundleError for a blob that is too large.
        """
        content = bytearray()
        request = model_service_pb2.DownloadBlobRequest(sha256=digest)
        try:
            call = self._manager.DownloadBlob(request, timeout=self._timeout_s, metadata=outgoing_metadata())
            async for piece in call:
                content += piece.data
                if len(content) > self._max_bytes:
                    call.cancel()
                    raise InvalidBundleError(
                        f"Blob {digest} has more than the {self._max_bytes} bytes that max_tokenizer_bytes allows. "
                        "Give the digest of a tokenizer.json.",
                        field="tokenizer_digest",
                    )
        except grpc.RpcError as error:
            raise _translated(error, digest) from error
        return bytes(content)

    async def needed(self) -> AsyncIterator[frozenset[NeededFile] | None]:
        """
        Yield the files that assigned versions need here, at once and after each change, for ever.

        None says that the manager cannot be asked; a lost connection is made again.
        """
        pause = _RECONNECT_S
        while True:
            try:
                async for response in self._workers.WatchAssignments(worker_service_pb2.WatchAssignmentsRequest()):
                    pause = _RECONNECT_S
                    versions = response.assignment.model_versions
                    yield frozenset(file for version in versions for file in _needed(version))
            except grpc.RpcError as error:
                _log.info("assignments not watched", error=from_rpc_error(error).message, retry_s=pause)
                yield None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_RECONNECT_S)

    async def tokenizer_digest(self, reference: ModelReference) -> str:
        """
        Return the digest of the `tokenizer.json` of a model version.

        Raises the manager's NotFoundError, TokenizerNotFoundError where the model has none, ManagerUnreachableError.
        """
        name, bundle = await self._bundle(reference)
        if bundle.tokenizer_digest is None:
            raise TokenizerNotFoundError(f"Model {name} has no tokenizer; it takes tensors.", field="model")
        return bundle.tokenizer_digest

    async def chat_template(self, reference: ModelReference) -> tuple[str, Mapping[str, str]]:
        """
        Return the digest of the file with a model version's chat template, and what the template calls by name.

        Raises the manager's NotFoundError, TokenizerNotFoundError where the model has none, ManagerUnreachableError.
        """
        name, bundle = await self._bundle(reference)
        if bundle.chat_template_digest is None:
            raise TokenizerNotFoundError(
                f"Model {name} has no chat template. Send it a prompt instead of messages.", field="model"
            )
        return bundle.chat_template_digest, bundle.manifest.special_tokens

    async def _bundle(self, reference: ModelReference) -> tuple[str, Bundle]:
        request = model_service_pb2.GetModelVersionRequest(model=str(reference))
        try:
            response = await self._manager.GetModelVersion(
                request, timeout=self._timeout_s, metadata=outgoing_metadata()
            )
        except grpc.RpcError as error:
            raise _translated(error) from error
        return _name(response.model_version), _bundle(response.model_version)


def _name(version: model_service_pb2.ModelVersion) -> str:
    return f"{version.model}@{version.model_version}"


def _bundle(version: model_service_pb2.ModelVersion) -> Bundle:
    files = tuple(BundleFile(file.path, file.sha256, file.size) for file in version.files)
    return Bundle(files, Manifest.from_json(version.manifest_json))


def _needed(version: model_service_pb2.ModelVersion) -> Iterator[NeededFile]:
    try:
        bundle = _bundle(version)
    except InvalidBundleError as error:  # a manifest that this release does not know
        _log.warning("version not understood", version=_name(version), error=error.message)
        return
    if digest := bundle.tokenizer_digest:
        yield NeededFile(Kind.TOKENIZER, digest)
    if digest := bundle.chat_template_digest:
        yield NeededFile(Kind.CHAT_TEMPLATE, digest)


def _translated(error: grpc.RpcError, digest: str = "") -> ModelfleetError:
    translated = from_rpc_error(error)
    if isinstance(translated, BlobNotFoundError):
        return TokenizerNotFoundError(
            f"The manager has no tokenizer with the digest {digest}. Push a model with it, or correct the digest.",
            field="tokenizer_digest",
        )
    if isinstance(translated, UnavailableError | DeadlineExpiredError):
        lacks = f"Blob {digest} is not here yet, and the" if digest else "The"
        return ManagerUnreachableError(f"{lacks} manager cannot be reached ({translated.message}). Retry.")
    return translated
