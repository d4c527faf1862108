"""InferenceService: from protos to the pipeline's words and back."""

import asyncio
import functools
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import numpy as np

from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1 import inference_pb2_grpc
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.manifest import Aggregation
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.generation.answering import Answering, Chunk, Prompt, Turn
from modelfleet.inference.generation.options import Grammar, Guidance, Options, Sampling
from modelfleet.inference.models import TensorModel, TextModel
from modelfleet.inference.pipeline import Pipeline, TextInput
from modelfleet.inference.results import INLINE_SCORES, Classified
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.tokenization import Truncation
from modelfleet.inference.tokens import TextUsage, Tokens
from modelfleet.runtime.errors import InvalidInputError
from modelfleet.runtime.paging import Page, PageRequest

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
TextRequest: TypeAlias = "pb.EmbedRequest | pb.ClassifyRequest"

_SERVED = "served models"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates; the pipeline answers."""

    def __init__(self, pipeline: Pipeline, answering: Answering, served: ServedModels) -> None:
        self._pipeline = pipeline
        self._answering = answering
        self._served = served

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        answer = await self._pipeline.embed(
            ModelReference.parse(request.model),
            _text_or_ids(request),
            deadline=deadline(context),
            dimensions=request.dimensions,
            normalize=request.normalize if request.HasField("normalize") else None,
        )
        return pb.EmbedResponse(
            model=answer.version.model,
            model_version=answer.version.model_version,
            vectors=answer.vectors.tobytes(),
            dimensions=answer.vectors.shape[1],
            usage=[_usage(usage) for usage in answer.usage],
        )

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        answer = await self._pipeline.classify(
            ModelReference.parse(request.model), _text_or_ids(request), deadline=deadline(context), top_k=request.top_k
        )
        write = functools.partial(_classified, answer)
        scores = sum(map(len, answer.labels))
        return write() if scores <= INLINE_SCORES else await asyncio.to_thread(write)

    async def ExtractEntities(self, request: pb.ExtractEntitiesRequest, context: Context) -> pb.ExtractEntitiesResponse:
        answer = await self._pipeline.extract_entities(
            ModelReference.parse(request.model),
            _text(request, request.texts),
            deadline=deadline(context),
            min_score=request.min_score,
            aggregation=_aggregation(request.aggregation),
        )
        return pb.ExtractEntitiesResponse(
            model=answer.version.model,
            model_version=answer.version.model_version,
            results=[
                pb.EntityList(
                    entities=[
                        pb.Entity(
                            label=entity.label,
                            text=entity.text,
                            start=entity.start,
                            end=entity.end,
                            score=entity.score,
                        )
                        for entity in entities
                    ],
                    usage=_usage(usage),
                )
                for entities, usage in zip(answer.entities, answer.usage, strict=True)
            ],
        )

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:
        answer = await self._pipeline.rerank(
            ModelReference.parse(request.model),
            request.query,
            _text(request, request.documents),
            deadline=deadline(context),
            top_k=request.top_k,
            raw=request.raw_scores,
        )
        return pb.RerankResponse(
            model=answer.version.model,
            model_version=answer.version.model_version,
            documents=[
                pb.RankedDocument(
                    index=document.index, score=document.score, usage=_usage(answer.usage[document.index])
                )
                for document in answer.documents
            ],
        )

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        chunks = self._answering.generate(
            ModelReference.parse(request.model),
            _prompt(request),
            _options(request),
            client=context.peer().rpartition(":")[0],  # without the port: a client may have many connections
            deadline=deadline(context),
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _chunk(chunk)

    async def ListServedModels(
        self, request: pb.ListServedModelsRequest, context: Context
    ) -> pb.ListServedModelsResponse:
        del context
        page_request = PageRequest(request.page_size, request.page_token)
        limit = page_request.limit
        left = self._served.versions()
        if after := page_request.after_version(_SERVED):
            left = [version for version in left if version.key > VersionKey(*after)]
        page = Page.cut(left[: limit + 1], limit, _SERVED, key=lambda version: version.key)
        return pb.ListServedModelsResponse(
            models=[self._served_model(version) for version in page.items], next_page_token=page.next_token
        )

    def _served_model(self, version: ServedVersion) -> pb.ServedModel:
        bundle, model = version.assigned.bundle, version.model
        message = pb.ServedModel(
            model=version.key.model,
            model_version=version.key.model_version,
            bundle_digest=bundle.digest,
            task=pb.Task.Value(f"TASK_{bundle.manifest.task.name}"),
            state=version_state_pb2.VersionState.Value(f"VERSION_STATE_{version.state.value}"),
            state_reason=version.reason,
            aliases=self._served.aliases(version.key),
            providers=model.session.providers if model else (),
            max_tokens=bundle.manifest.max_tokens or 0,
            max_batch_tokens=model.limits.max_tokens if model else 0,
            labels=bundle.manifest.labels,
            tokenizer_digest=bundle.tokenizer_digest or "",
        )
        if isinstance(model, TextModel):
            message.max_tokens = model.max_tokens
        if isinstance(model, TextModel | TensorModel):
            message.batching = pb.Batching.Value(f"BATCHING_{model.sharing.batching.name}")
            message.batching_deviation = model.sharing.deviation
        return message


def _classified(answer: Classified) -> pb.ClassifyResponse:
    return pb.ClassifyResponse(
        model=answer.version.model,
        model_version=answer.version.model_version,
        classifications=[
            pb.Classification(
                labels=[pb.LabelScore(label=scored.label, score=scored.score) for scored in labels],
                usage=_usage(usage),
            )
            for labels, usage in zip(answer.labels, answer.usage, strict=True)
        ],
    )


def deadline(context: Context) -> float:
    """Return the caller's deadline in seconds on the monotonic clock; infinite where it set none."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else time.monotonic() + remaining


def _text_or_ids(request: TextRequest) -> TextInput:
    if not request.HasField("token_ids"):
        return _text(request, request.texts)
    if request.texts:
        raise InvalidInputError("Both texts and token_ids are given. Give one of them.", field="token_ids")
    return TextInput(tokens=_tokens(request.token_ids))


def _text(request: "TextRequest | pb.ExtractEntitiesRequest | pb.RerankRequest", texts: Sequence[str]) -> TextInput:
    return TextInput(
        texts=list(texts),
        truncation=_truncation(request.truncation),
        stride=request.windowing.stride if request.HasField("windowing") else None,
    )


def _aggregation(value: "pb.Aggregation.ValueType") -> Aggregation | None:
    if value == pb.AGGREGATION_UNSPECIFIED:
        return None
    if value not in pb.Aggregation.values():
        raise InvalidInputError(f"aggregation is {value}, which this release does not know.", field="aggregation")
    return Aggregation(pb.Aggregation.Name(value).removeprefix("AGGREGATION_").lower())


def _truncation(value: "tokenizer_pb2.Truncation.ValueType") -> Truncation:
    if value == tokenizer_pb2.TRUNCATION_UNSPECIFIED:
        return Truncation.RIGHT
    if value not in tokenizer_pb2.Truncation.values():
        raise InvalidInputError(f"truncation is {value}, which this release does not know.", field="truncation")
    return Truncation(tokenizer_pb2.Truncation.Name(value).removeprefix("TRUNCATION_"))


def _tokens(message: pb.TokenIds) -> Tokens:
    for field in ("ids", "lengths"):
        if size := len(getattr(message, field)) % 4:
            raise InvalidInputError(
                f"token_ids.{field} ends {size} bytes into a number. Pack little-endian int32.",
                field=f"token_ids.{field}",
            )
    return Tokens.whole(
        ids=np.frombuffer(message.ids, "<i4"),
        lengths=np.frombuffer(message.lengths, "<i4"),
        type_ids=np.frombuffer(message.type_ids, np.uint8) if message.type_ids else None,
    )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    if size := len(request.token_ids) % 4:
        raise InvalidInputError(
            f"token_ids ends {size} bytes into a number. Pack little-endian int32.", field="token_ids"
        )
    return Prompt(
        text=request.prompt,
        turns=tuple(Turn(message.role, message.content) for message in request.messages),
        template_variables_json=request.template_variables_json,
        tools_json=request.tools_json,
        token_ids=np.frombuffer(request.token_ids, "<i4") if request.token_ids else None,
    )


def _options(request: pb.GenerateRequest) -> Options:
    given = request.sampling
    values = {
        name: getattr(given, name)
        for name in ("temperature", "top_k", "top_p", "seed", "repetition_penalty")
        if given.HasField(name)
    }
    grammar = request.guidance.WhichOneof("grammar")
    return Options(
        max_tokens=request.max_tokens,
        sampling=Sampling(**values),
        stop=tuple(request.stop),
        n=request.n or 1,
        guidance=Guidance(Grammar(grammar), getattr(request.guidance, grammar)) if grammar else None,
        logprobs=request.logprobs,
    )


def _chunk(chunk: Chunk) -> pb.GenerateResponse:
    message = pb.GenerateResponse(
        model=chunk.version.model,
        model_version=chunk.version.model_version,
        index=chunk.index,
        text=chunk.text,
        token_ids=np.array(chunk.token_ids, "<i4").tobytes(),
        logprobs=np.array(chunk.logprobs, "<f4").tobytes(),
        stop=chunk.stop or "",
    )
    if chunk.finish:
        message.finish_reason = pb.FinishReason.Value(f"FINISH_REASON_{chunk.finish.value}")
    if chunk.usage:
        message.usage.CopyFrom(
            pb.GenerateUsage(
                prompt_tokens=chunk.usage.prompt_tokens,
                cached_prompt_tokens=chunk.usage.cached_prompt_tokens,
                generated_tokens=chunk.usage.generated_tokens,
            )
        )
    return message


def _usage(usage: TextUsage) -> pb.TextUsage:
    return pb.TextUsage(token_count=usage.token_count, truncated=usage.truncated, window_count=usage.window_count)
