"""A manager that assigns what a test says and keeps what workers report: for tests of one worker on its own."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from modelfleet.api.manager.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    version_state_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from harness.graphs import SampleBundle

_PIECE_BYTES = 1 << 20

Report = worker_service_pb2.VersionStatus


class AssigningManager(worker_service_pb2_grpc.WorkerServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """Speaks WorkerService and the part of ModelService that workers use."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.reports: dict[str, Report] = {}
        self._assignment = worker_service_pb2.Assignment()
        self._changed = asyncio.Condition()

    async def assign(
        self, versions: Mapping[str, SampleBundle], aliases: Mapping[str, int | Mapping[int, int]]
    ) -> None:
        """Assign versions by `name@number`, and `stable` by name of model: to a number, or by numbers to weights."""
        assignment = worker_service_pb2.Assignment(revision=self._assignment.revision + 1)
        for key, sample in sorted(versions.items()):
            model, _, number = key.partition("@")
            self.contents |= sample.contents
            assignment.model_versions.append(
                model_service_pb2.ModelVersion(
                    model=model,
                    model_version=int(number),
                    bundle_digest=sample.bundle.digest,
                    manifest_json=sample.bundle.manifest.to_json(),
                    files=[
                        model_service_pb2.BundleFile(path=file.path, sha256=file.sha256, size=file.size)
                        for file in sample.bundle.files
                    ],
                )
            )
        for model, target in sorted(aliases.items()):
            weights = target if isinstance(target, Mapping) else {target: 1}
            targets = [worker_service_pb2.WeightedVersion(model_version=n, weight=w) for n, w in weights.items()]
            assignment.routes.append(worker_service_pb2.AliasRoute(model=model, alias="stable", targets=targets))
        async with self._changed:
            self._assignment = assignment
            self._changed.notify_all()

    async def reported(self, key: str, state: str) -> Report:
        """Return the report in which a version has a state, once it is there."""
        wanted = version_state_pb2.VersionState.Value(f"VERSION_STATE_{state}")
        async with asyncio.timeout(15), self._changed:
            await self._changed.wait_for(lambda: key in self.reports and self.reports[key].state == wanted)
            return self.reports[key]

    async def WatchAssignments(  # noqa: N802  as in the contract
        self, _request: Any, _context: Any
    ) -> AsyncIterator[worker_service_pb2.WatchAssignmentsResponse]:
        sent = -1  # the first snapshot is sent at once, also an empty one
        while True:
            async with self._changed:
                while self._assignment.revision == sent:
                    await self._changed.wait()
                assignment = self._assignment
            sent = assignment.revision
            yield worker_service_pb2.WatchAssignmentsResponse(assignment=assignment)

    async def ReportStatus(self, request: Any, _context: Any) -> worker_service_pb2.ReportStatusResponse:  # noqa: N802
        async with self._changed:
            self.reports = {f"{version.model}@{version.model_version}": version for version in request.versions}
            self._changed.notify_all()
        return worker_service_pb2.ReportStatusResponse()

    async def GetBlobUrl(self, _request: Any, _context: Any) -> model_service_pb2.GetBlobUrlResponse:  # noqa: N802
        return model_service_pb2.GetBlobUrlResponse()

    async def DownloadBlob(  # noqa: N802  as in the contract
        self, request: Any, _context: Any
    ) -> AsyncIterator[model_service_pb2.DownloadBlobResponse]:
        content = self.contents[request.sha256]
        for start in range(request.offset, len(content), _PIECE_BYTES):
            yield model_service_pb2.DownloadBlobResponse(data=content[start : start + _PIECE_BYTES])
