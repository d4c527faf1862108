"""A small inference service for tests of clients: it answers from the letters of the texts."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.api.oip.v2 import open_inference_pb2 as oip_pb
from modelfleet.api.oip.v2.open_inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)
from modelfleet.client.packing import pack_vectors, unpack_ints
from modelfleet.runtime.affinity import affinity_key
from modelfleet.runtime.errors import ModelfleetError

from harness.serving import serving

READY = version_state_pb2.VERSION_STATE_READY


@dataclass
class Letters(InferenceServiceServicer, GRPCInferenceServiceServicer):
    """
    Serves `letters`, whose newest version is `model_version`. A text scores its number of letters.

    `requests` are those that came, `affinity_keys` what came beside them. `fail`, called with each request, may return
    an error to raise.
    """

    model_version: int = 1
    served: list[pb.ServedModel] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    affinity_keys: list[str] = field(default_factory=list)
    fail: Callable[[Any], ModelfleetError | None] = lambda _: None

    async def Embed(self, request: pb.EmbedRequest, _context: Any) -> pb.EmbedResponse:  # noqa: N802
        self._take(request)
        lengths = unpack_ints(request.token_ids.lengths).tolist() or [len(text) for text in request.texts]
        return pb.EmbedResponse(
            **self._version(request.model),
            vectors=pack_vectors([[length, 1] for length in lengths]),
            dimensions=2,
            usage=[pb.TextUsage(token_count=length, window_count=1) for length in lengths],
        )

    async def Classify(self, request: pb.ClassifyRequest, _context: Any) -> pb.ClassifyResponse:  # noqa: N802
        self._take(request)
        found = [
            pb.Classification(labels=[pb.LabelScore(label=text[:1], score=1)], usage=_usage(text))
            for text in request.texts
        ]
        return pb.ClassifyResponse(**self._version(request.model), classifications=found)

    async def ExtractEntities(  # noqa: N802
        self, request: pb.ExtractEntitiesRequest, _context: Any
    ) -> pb.ExtractEntitiesResponse:
        self._take(request)
        found = [
            pb.EntityList(
                entities=[pb.Entity(label="FIRST", text=text[:1], start=0, end=1, score=0.5)], usage=_usage(text)
            )
            for text in request.texts
        ]
        return pb.ExtractEntitiesResponse(**self._version(request.model), results=found)

    async def Rerank(self, request: pb.RerankRequest, _context: Any) -> pb.RerankResponse:  # noqa: N802
        self._take(request)
        ranked = sorted(enumerate(request.documents), key=lambda pair: -len(pair[1]))
        found = [
            pb.RankedDocument(
                index=index, score=len(text) if request.raw_scores else probability(len(text)), usage=_usage(text)
            )
            for index, text in ranked[: request.top_k or None]
        ]
        return pb.RerankResponse(**self._version(request.model), documents=found)

    async def ListServedModels(  # noqa: N802
        self, request: pb.ListServedModelsRequest, _context: Any
    ) -> pb.ListServedModelsResponse:
        """Answer with pages of one."""
        self._take(request)
        start = int(request.page_token or 0)
        more = start + 1 < len(self.served)
        return pb.ListServedModelsResponse(
            models=self.served[start : start + 1], next_page_token=str(start + 1) if more else ""
        )

    async def ModelInfer(self, request: oip_pb.ModelInferRequest, _context: Any) -> oip_pb.ModelInferResponse:  # noqa: N802
        """Answer with the inputs."""
        self._take(request)
        response = oip_pb.ModelInferResponse(raw_output_contents=request.raw_input_contents)
        for tensor in request.inputs:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return response

    def _take(self, request: Any) -> None:
        self.requests.append(request)
        self.affinity_keys.append(affinity_key.get())
        if error := self.fail(request):
            raise error

    def _version(self, reference: str) -> dict[str, Any]:
        model, _, number = reference.partition("@")
        return {"model": model, "model_version": int(number) if number.isdigit() else self.model_version}


def probability(logit: float) -> float:
    """Return what a worker makes of a logit: in float32, of which many are 1."""
    return float(np.float32(1) / (np.float32(1) + np.exp(np.float32(-logit))))


def served(model: str, number: int, state: int = READY, **values: Any) -> pb.ServedModel:
    """Return an entry of the list of served models."""
    return pb.ServedModel(model=model, model_version=number, state=state, task=pb.TASK_EMBED, **values)


@asynccontextmanager
async def serving_letters(letters: Letters, **settings: Any) -> AsyncIterator[dict[str, str]]:
    """Serve until the block ends; yields the settings of a client."""

    def register(server: Any) -> None:
        add_InferenceServiceServicer_to_server(letters, server)
        add_GRPCInferenceServiceServicer_to_server(letters, server)

    async with serving(register, **settings) as address:
        yield {"inference": address}


def _usage(text: str) -> pb.TextUsage:
    return pb.TextUsage(token_count=len(text), window_count=1)
