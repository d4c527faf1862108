"""StorageService: messages in, messages out."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc

from modelfleet.api.manager.v1 import storage_service_pb2 as pb
from modelfleet.api.manager.v1.storage_service_pb2_grpc import StorageServiceServicer
from modelfleet.manager.blob_check import BlobCheck
from modelfleet.manager.garbage import GarbageCollector

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StorageServicer(StorageServiceServicer):
    """Garbage collection and the check of blobs over gRPC."""

    def __init__(self, garbage: GarbageCollector, check: BlobCheck) -> None:
        self._garbage = garbage
        self._check = check

    async def CollectGarbage(self, request: pb.CollectGarbageRequest, context: Context) -> pb.CollectGarbageResponse:
        del context
        grace_s = request.grace_period.ToTimedelta().total_seconds() if request.HasField("grace_period") else None
        collected = await asyncio.to_thread(self._garbage.collect, dry_run=request.dry_run, grace_s=grace_s)
        return pb.CollectGarbageResponse(
            blobs=[pb.GarbageBlob(sha256=blob.sha256, size=blob.size) for blob in collected.blobs],
            blob_count=collected.blob_count,
            bytes=collected.bytes,
        )

    async def CheckBlobs(self, request: pb.CheckBlobsRequest, context: Context) -> pb.CheckBlobsResponse:
        del context
        page = await self._check.check(request.page_token, repair=request.repair)
        return pb.CheckBlobsResponse(
            problems=[
                pb.BlobProblem(
                    kind=pb.BlobProblemKind.Value(f"BLOB_PROBLEM_KIND_{problem.kind}"),
                    sha256=problem.sha256,
                    detail=problem.detail,
                    model_versions=problem.model_versions,
                    repaired=problem.repaired,
                )
                for problem in page.problems
            ],
            checked_blobs=page.blobs,
            checked_bytes=page.bytes,
            next_page_token=page.next_token,
        )
