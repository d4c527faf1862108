"""The manager as a worker sees it: gRPC on one side, the domain's words on the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict

import grpc
import structlog

from modelfleet.api.manager.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    version_state_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest
from modelfleet.bundle.reference import ModelReference
from modelfleet.client.errors import from_rpc_error
from modelfleet.inference.assignment import AssignedVersion, Assignment, Route, VersionKey, WeightedVersion
from modelfleet.inference.object_reading import read_url
from modelfleet.inference.served_models import ServedVersion
from modelfleet.runtime.errors import ManagerUnreachableError, ModelfleetError

_log = structlog.get_logger()

_RECONNECT_S = 0.5
_CALL_TIMEOUT_S = 5.0


class ManagerClient:
    """One worker's line to the manager."""

    def __init__(self, channel: grpc.aio.Channel, *, worker: str, pool: str) -> None:
        self._models = model_service_pb2_grpc.ModelServiceStub(channel)
        self._workers = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self._worker = worker
        self._pool = pool
        # What is assigned, and what it means; or why this release, older than the manager's, does not know.
        self._known: dict[VersionKey, tuple[model_service_pb2.ModelVersion, AssignedVersion | str]] = {}

    async def assignments(self) -> AsyncIterator[Assignment]:
        """Yield the newest assignment at once and after each change, for ever: lost connections are made again."""
        request = worker_service_pb2.WatchAssignmentsRequest(worker=self._worker, pool=self._pool)
        while True:
            try:
                async for response in self._workers.WatchAssignments(request, wait_for_ready=True):
                    yield self._assignment(response.assignment)
            except grpc.RpcError as error:
                _log.warning("manager lost; serving what is here", error=from_rpc_error(error).message)
            await asyncio.sleep(_RECONNECT_S)

    def _assignment(self, message: worker_service_pb2.Assignment) -> Assignment:
        # Only what is new is read: checking the manifests and files of 200 versions takes 90 ms of the event loop.
        before, self._known = self._known, {}
        for version in message.model_versions:
            key = VersionKey(version.model, version.model_version)
            known = before.get(key)
            self._known[key] = known if known and known[0] == version else (version, _assigned_version(key, version))
        return Assignment(
            revision=message.revision,
            versions=tuple(known for _, known in self._known.values() if isinstance(known, AssignedVersion)),
            routes=tuple(
                Route(
                    route.model,
                    route.alias,
                    tuple(WeightedVersion(target.model_version, target.weight) for target in route.targets),
                )
                for route in message.routes
            ),
        )

    async def report(self, revision: int, versions: list[ServedVersion]) -> None:
        """Tell what this worker holds. Raises ManagerUnreachableError."""
        request = worker_service_pb2.ReportStatusRequest(
            worker=self._worker,
            pool=self._pool,
            revision=revision,
            versions=[_status(version) for version in versions],
        )
        request.versions.extend(
            _refusal(key, known) for key, (_, known) in self._known.items() if isinstance(known, str)
        )
        try:
            await self._workers.ReportStatus(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _translated(error) from error

    async def download(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """
        Yield the bytes of a blob from `offset` on. Raises BlobNotFoundError or ManagerUnreachableError.

        They come straight from the object store, or from the manager where that knows no URL or the store fails.
        """
        if url := await self._blob_url(sha256):
            try:
                async with aclosing(read_url(url, offset)) as pieces:
                    async for piece in pieces:
                        yield piece
                        offset += len(piece)
            except OSError as error:
                _log.warning("object store failed; asking the manager", sha256=sha256, at=offset, error=str(error))
            else:
                return
        request = model_service_pb2.DownloadBlobRequest(sha256=sha256, offset=offset)
        try:
            async for response in self._models.DownloadBlob(request):
                yield response.data
        except grpc.RpcError as error:
            raise _translated(error) from error

    async def _blob_url(self, sha256: str) -> str:
        request = model_service_pb2.GetBlobUrlRequest(sha256=sha256)
        try:
            return (await self._models.GetBlobUrl(request, timeout=_CALL_TIMEOUT_S)).url
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # a manager of an earlier release
                return ""
            raise _translated(error) from error

    async def check_registered(self, reference: ModelReference) -> None:
        """Return if the manager knows the reference. Raises its NotFoundError, or ManagerUnreachableError."""
        request = model_service_pb2.GetModelVersionRequest(model=str(reference))
        try:
            await self._models.GetModelVersion(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _translated(error) from error


def _status(version: ServedVersion) -> worker_service_pb2.VersionStatus:
    status = worker_service_pb2.VersionStatus(
        model=version.key.model,
        model_version=version.key.model_version,
        state=version_state_pb2.VersionState.Value(f"VERSION_STATE_{version.state.value}"),
        reason=version.reason,
    )
    if model := version.model:
        status.providers.extend(model.session.providers)
        status.memory.MergeFrom(worker_service_pb2.SessionMemory(**asdict(model.memory)))
    if record := version.record:
        with record.lock:
            status.traffic.MergeFrom(
                worker_service_pb2.Traffic(
                    request_count=record.success.count + record.fail.count,
                    failure_count=record.faults,
                    latency_counts=record.latency_counts,
                )
            )
    return status


def _translated(error: grpc.RpcError) -> ModelfleetError:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return ManagerUnreachableError(f"The manager cannot be reached ({error.details()}). Retry.")
    return from_rpc_error(error)


def _refusal(key: VersionKey, reason: str) -> worker_service_pb2.VersionStatus:
    return worker_service_pb2.VersionStatus(
        model=key.model,
        model_version=key.model_version,
        state=version_state_pb2.VERSION_STATE_FAILED,
        reason=f"This worker's release does not know the version: {reason}",
    )


def _assigned_version(key: VersionKey, message: model_service_pb2.ModelVersion) -> AssignedVersion | str:
    files = tuple(BundleFile(file.path, file.sha256, file.size) for file in message.files)
    try:
        return AssignedVersion(key, Bundle(files, Manifest.from_json(message.manifest_json)))
    except ModelfleetError as error:
        _log.error("version not understood", version=str(key), error=error.message)
        return error.message
