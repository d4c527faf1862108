"""A servicer whose answers a test writes: one RPC of each kind."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1 import model_service_pb2_grpc


@dataclass
class Scripted(model_service_pb2_grpc.ModelServiceServicer):
    """`unary` answers GetModel, `stream` DownloadBlob and `upload` PushModelVersion; a test sets those it calls."""

    unary: Callable[[Any, Any], Awaitable[pb.GetModelResponse]] | None = None
    stream: Callable[[Any, Any], AsyncIterator[pb.DownloadBlobResponse]] | None = None
    upload: Callable[[AsyncIterator[Any], Any], Awaitable[pb.PushModelVersionResponse]] | None = None

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802  as in the contract
        return await self.unary(request, context)

    async def DownloadBlob(  # noqa: N802  as in the contract
        self, request: Any, context: Any
    ) -> AsyncIterator[pb.DownloadBlobResponse]:
        async for response in self.stream(request, context):
            yield response

    async def PushModelVersion(  # noqa: N802  as in the contract
        self, requests: AsyncIterator[Any], context: Any
    ) -> pb.PushModelVersionResponse:
        return await self.upload(requests, context)
