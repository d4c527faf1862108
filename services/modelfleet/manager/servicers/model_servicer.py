"""ModelService: messages in, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, TypeAlias

import grpc

from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceServicer
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest
from modelfleet.bundle.reference import ModelReference
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.registry import Registry
from modelfleet.manager.servicers.messages import alias_message, model_message, model_version_message
from modelfleet.manager.uploads import Chunk, Uploads
from modelfleet.runtime.errors import InvalidInputError, ModelfleetError
from modelfleet.runtime.paging import PageRequest

# How long what a refused push still sends is read and thrown away. A client whose write fails may take that for the
# outcome, as grpc's asyncio client does, and never see the status.
_LINGER_S = 2.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ModelServicer(ModelServiceServicer):
    """The registry and the blobs over gRPC. The registry blocks, so it is called in threads."""

    def __init__(self, registry: Registry, blobs: Blobs, uploads: Uploads) -> None:
        self._registry = registry
        self._blobs = blobs
        self._uploads = uploads

    async def FindMissingBlobs(
        self, request: pb.FindMissingBlobsRequest, context: Context
    ) -> pb.FindMissingBlobsResponse:
        del context
        return pb.FindMissingBlobsResponse(missing_sha256=await self._blobs.find_missing(request.sha256))

    async def PushModelVersion(
        self, request_iterator: AsyncIterable[pb.PushModelVersionRequest], context: Context
    ) -> pb.PushModelVersionResponse:
        del context
        parts = aiter(request_iterator)
        try:
            return await self._push(parts)
        except ModelfleetError:
            await _read_rest(parts)
            raise

    async def _push(self, parts: AsyncIterator[pb.PushModelVersionRequest]) -> pb.PushModelVersionResponse:
        first = await anext(parts, pb.PushModelVersionRequest())
        if not first.HasField("header"):
            raise InvalidInputError(
                "A push began without its header. Send the header first, then chunks.", field="header"
            )
        header = first.header
        bundle = Bundle(
            tuple(BundleFile(file.path, file.sha256, file.size) for file in header.files),
            Manifest.from_json(header.manifest_json),
        )
        registration = await self._uploads.push(
            header.model, bundle, header.alias or None, _chunks(parts), header.pools
        )
        return pb.PushModelVersionResponse(
            model_version=model_version_message(registration.model_version), created=registration.created
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        del context
        return pb.GetModelResponse(model=model_message(await asyncio.to_thread(self._registry.model, request.model)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        del context
        page = await asyncio.to_thread(self._registry.models, PageRequest(request.page_size, request.page_token))
        return pb.ListModelsResponse(
            models=[model_message(model) for model in page.items], next_page_token=page.next_token
        )

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, context: Context) -> pb.GetModelVersionResponse:
        del context
        version = await asyncio.to_thread(self._registry.model_version, ModelReference.parse(request.model))
        return pb.GetModelVersionResponse(model_version=model_version_message(version))

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        del context
        page = await asyncio.to_thread(
            self._registry.model_versions, request.model, PageRequest(request.page_size, request.page_token)
        )
        return pb.ListModelVersionsResponse(
            model_versions=[model_version_message(version) for version in page.items], next_page_token=page.next_token
        )

    async def DeleteModelVersion(
        self, request: pb.DeleteModelVersionRequest, context: Context
    ) -> pb.DeleteModelVersionResponse:
        del context
        await asyncio.to_thread(self._registry.delete_model_version, request.model, request.model_version)
        return pb.DeleteModelVersionResponse()

    async def GetBlobUrl(self, request: pb.GetBlobUrlRequest, context: Context) -> pb.GetBlobUrlResponse:
        del context
        return pb.GetBlobUrlResponse(url=await self._blobs.signed_url(request.sha256))

    async def DownloadBlob(
        self, request: pb.DownloadBlobRequest, context: Context
    ) -> AsyncIterator[pb.DownloadBlobResponse]:
        del context
        async with aclosing(self._blobs.read(request.sha256, request.offset)) as pieces:
            async for piece in pieces:
                yield pb.DownloadBlobResponse(data=piece)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        del context
        alias = await asyncio.to_thread(self._registry.set_alias, request.model, request.alias, request.model_version)
        return pb.SetAliasResponse(alias=alias_message(alias))

    async def PlaceModel(self, request: pb.PlaceModelRequest, context: Context) -> pb.PlaceModelResponse:
        del context
        model = await asyncio.to_thread(self._registry.place, request.model, request.pools)
        return pb.PlaceModelResponse(model=model_message(model))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        del context
        await asyncio.to_thread(self._registry.delete_alias, request.model, request.alias)
        return pb.DeleteAliasResponse()


async def _chunks(parts: AsyncIterator[pb.PushModelVersionRequest]) -> AsyncIterator[Chunk]:
    async for part in parts:
        if not part.HasField("chunk"):
            raise InvalidInputError(
                "A part of a push after the header is no chunk. Send one header, then only chunks.", field="chunk"
            )
        yield Chunk(part.chunk.sha256, part.chunk.data)


async def _read_rest(parts: AsyncIterator[pb.PushModelVersionRequest]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            async for _ in parts:
                pass
