"""A manager that only hands out tokenizers, for tests of the tokenizer service on its own."""

from collections.abc import AsyncIterator

from modelfleet.api.manager.v1 import model_service_pb2, model_service_pb2_grpc
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.runtime.errors import BlobNotFoundError, ModelNotFoundError
from modelfleet.runtime.telemetry import request_id

_PIECE_BYTES = 1000


class BlobManager(model_service_pb2_grpc.ModelServiceServicer):
    """`blobs` is by digest, `models` the digest of each model's tokenizer; "" for a model that takes tensors."""

    def __init__(self, blobs: dict[str, bytes], models: dict[str, str] | None = None) -> None:
        self.blobs = blobs
        self.models = models or {}
        self.downloads: list[str] = []
        self.request_ids: list[str] = []

    async def DownloadBlob(  # noqa: N802  as in the contract
        self, request: model_service_pb2.DownloadBlobRequest, _context: object
    ) -> AsyncIterator[model_service_pb2.DownloadBlobResponse]:
        self.downloads.append(request.sha256)
        self.request_ids.append(request_id.get())
        if request.sha256 not in self.blobs:
            raise BlobNotFoundError(f"No blob {request.sha256}.", field="sha256")
        content = self.blobs[request.sha256]
        for start in range(0, len(content), _PIECE_BYTES):
            yield model_service_pb2.DownloadBlobResponse(data=content[start : start + _PIECE_BYTES])

    async def GetModelVersion(  # noqa: N802  as in the contract
        self, request: model_service_pb2.GetModelVersionRequest, _context: object
    ) -> model_service_pb2.GetModelVersionResponse:
        name = request.model.partition("@")[0]
        if name not in self.models:
            raise ModelNotFoundError(f"No model is named {name!r}.", field="model")
        files = [model_service_pb2.BundleFile(path="model.onnx", sha256="0" * 64, size=1)]
        if digest := self.models[name]:
            files.append(model_service_pb2.BundleFile(path="tokenizer.json", sha256=digest, size=1))
            manifest = Manifest(task=Task.EMBED, model="model.onnx", tokenizer="tokenizer.json", max_tokens=8)
        else:
            manifest = Manifest(task=Task.TENSOR, model="model.onnx")
        return model_service_pb2.GetModelVersionResponse(
            model_version=model_service_pb2.ModelVersion(
                model=name, model_version=1, manifest_json=manifest.to_json(), files=files
            )
        )
