"""Calls of the inference service."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.oip.v2 import open_inference_pb2 as oip_pb
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.reference import DEFAULT_ALIAS, ModelReference
from modelfleet.client.answers import (
    Classification,
    Classifications,
    Embeddings,
    Entity,
    ExtractedEntities,
    LabelScore,
    RankedDocument,
    Ranking,
    TextEntities,
    TextUsage,
)
from modelfleet.client.datatypes import Array
from modelfleet.client.packing import as_ids, pack_sequences, unpack_vectors
from modelfleet.client.splitting import ask_in_parts, parts, text_list, text_sizes
from modelfleet.client.steps import Method, Procedure, Service, ask
from modelfleet.client.tensors import infer_outputs, infer_request
from modelfleet.runtime.errors import InvalidInputError

Aggregation: TypeAlias = Literal["simple", "first", "max", "average"]
Truncation: TypeAlias = Literal["right", "left", "forbidden"]

_PATH = "/modelfleet.api.inference.v1.InferenceService"
EMBED = Method(Service.INFERENCE, f"{_PATH}/Embed", pb.EmbedResponse)
CLASSIFY = Method(Service.INFERENCE, f"{_PATH}/Classify", pb.ClassifyResponse)
EXTRACT_ENTITIES = Method(Service.INFERENCE, f"{_PATH}/ExtractEntities", pb.ExtractEntitiesResponse)
RERANK = Method(Service.INFERENCE, f"{_PATH}/Rerank", pb.RerankResponse)
MODEL_INFER = Method(Service.INFERENCE, "/inference.GRPCInferenceService/ModelInfer", oip_pb.ModelInferResponse)

_TRUNCATION: Mapping[str, tokenizer_pb2.Truncation.ValueType] = {
    "right": tokenizer_pb2.TRUNCATION_RIGHT,
    "left": tokenizer_pb2.TRUNCATION_LEFT,
    "forbidden": tokenizer_pb2.TRUNCATION_FORBIDDEN,
}


def embed(
    model: str,
    texts: Sequence[str] = (),
    *,
    token_ids: Sequence[npt.ArrayLike] = (),
    normalize: bool | None = None,
    dimensions: int = 0,
    truncation: Truncation = "right",
    window_stride: int | None = None,
    affinity_key: str = "",
    timeout_s: float | None = None,
) -> Procedure[Embeddings]:
    """
    Turn texts, or sequences of token ids, into vectors. Batches of any size are taken.

    Texts that are too long for the model are cut as `truncation` says, or covered by windows that share
    `window_stride` tokens. `normalize` overrules the model's manifest; `dimensions` keeps the leading ones only.
    Calls with one `affinity_key`, such as a user's id, are answered by one version while the alias names two.
    """
    texts = text_list(texts, "texts")
    sizes, inputs = _inputs(texts, token_ids)

    def request(reference: str, part: slice) -> pb.EmbedRequest:
        return pb.EmbedRequest(
            model=reference,
            texts=texts[part],
            token_ids=inputs(part),
            truncation=truncation_value(truncation),
            windowing=windowing_message(window_stride),
            dimensions=dimensions,
            normalize=normalize,
        )

    responses = yield from ask_in_parts(EMBED, model, sizes, request, timeout_s, affinity_key=affinity_key)
    vectors = [unpack_vectors(response.vectors, response.dimensions) for response in responses]
    return Embeddings(
        vectors=vectors[0] if len(vectors) == 1 else np.concatenate(vectors),
        usage=tuple(_usage(usage) for response in responses for usage in response.usage),
        model=responses[0].model,
        model_version=responses[0].model_version,
    )


def classify(
    model: str,
    texts: Sequence[str] = (),
    *,
    token_ids: Sequence[npt.ArrayLike] = (),
    top_k: int = 0,
    truncation: Truncation = "right",
    window_stride: int | None = None,
    affinity_key: str = "",
    timeout_s: float | None = None,
) -> Procedure[Classifications]:
    """Score the labels of texts, or of token ids; `top_k` keeps the best only. See `embed` for the rest."""
    texts = text_list(texts, "texts")
    sizes, inputs = _inputs(texts, token_ids)

    def request(reference: str, part: slice) -> pb.ClassifyRequest:
        return pb.ClassifyRequest(
            model=reference,
            texts=texts[part],
            token_ids=inputs(part),
            truncation=truncation_value(truncation),
            windowing=windowing_message(window_stride),
            top_k=top_k,
        )

    responses = yield from ask_in_parts(CLASSIFY, model, sizes, request, timeout_s, affinity_key=affinity_key)
    found = chain.from_iterable(response.classifications for response in responses)
    return Classifications(
        results=tuple(
            Classification(tuple(LabelScore(label.label, label.score) for label in one.labels), _usage(one.usage))
            for one in found
        ),
        model=responses[0].model,
        model_version=responses[0].model_version,
    )


def extract_entities(
    model: str,
    texts: Sequence[str],
    *,
    min_score: float = 0,
    aggregation: Aggregation | None = None,
    truncation: Truncation = "right",
    window_stride: int | None = None,
    affinity_key: str = "",
    timeout_s: float | None = None,
) -> Procedure[ExtractedEntities]:
    """
    Find labelled spans in texts; those below `min_score` are left out.

    `aggregation` says how the labels of a word's tokens become the word's: `first` token's, that of the surest (`max`),
    by their `average`, or not at all (`simple`); None as the model's manifest says. See `embed` for the rest.
    """
    texts = text_list(texts, "texts")

    def request(reference: str, part: slice) -> pb.ExtractEntitiesRequest:
        return pb.ExtractEntitiesRequest(
            model=reference,
            texts=texts[part],
            truncation=truncation_value(truncation),
            windowing=windowing_message(window_stride),
            min_score=min_score,
            aggregation=aggregation_value(aggregation),
        )

    responses = yield from ask_in_parts(
        EXTRACT_ENTITIES, model, text_sizes(texts, "texts"), request, timeout_s, affinity_key=affinity_key
    )
    found = chain.from_iterable(response.results for response in responses)
    return ExtractedEntities(
        results=tuple(
            TextEntities(
                tuple(Entity(one.label, one.text, one.start, one.end, one.score) for one in result.entities),
                _usage(result.usage),
            )
            for result in found
        ),
        model=responses[0].model,
        model_version=responses[0].model_version,
    )


def rerank(
    model: str,
    query: str,
    documents: Sequence[str],
    *,
    top_k: int = 0,
    raw_scores: bool = False,
    truncation: Truncation = "right",
    window_stride: int | None = None,
    affinity_key: str = "",
    timeout_s: float | None = None,
) -> Procedure[Ranking]:
    """Order documents by relevance to a query; `top_k` keeps the best only. See `embed` for the rest."""
    text_sizes([query], "query")
    documents = text_list(documents, "documents")
    sizes = text_sizes(documents, "documents")
    slices = parts(sizes)

    def request(reference: str, part: slice) -> pb.RerankRequest:
        return pb.RerankRequest(
            model=reference,
            query=query,
            documents=documents[part],
            truncation=truncation_value(truncation),
            windowing=windowing_message(window_stride),
            top_k=top_k,
            # Of probabilities that round to 1, those of different parts could not be told apart.
            raw_scores=raw_scores or len(slices) > 1,
        )

    responses = yield from ask_in_parts(RERANK, model, sizes, request, timeout_s, affinity_key=affinity_key)
    found = [
        (one.score, part.start + one.index, _usage(one.usage))
        for part, response in zip(slices, responses, strict=True)
        for one in response.documents
    ]
    found.sort(key=lambda document: -document[0])
    scores = [score for score, _, _ in found]
    if len(slices) > 1 and not raw_scores:
        scores = _sigmoid(scores)
    ranked = [RankedDocument(index, score, usage) for score, (_, index, usage) in zip(scores, found, strict=True)]
    return Ranking(
        documents=tuple(ranked[: top_k or None]),
        model=responses[0].model,
        model_version=responses[0].model_version,
    )


def infer(
    model: str,
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] = (),
    affinity_key: str = "",
    timeout_s: float | None = None,
) -> Procedure[dict[str, Array]]:
    """
    Run a model on raw tensors through the Open Inference Protocol; returns its outputs, or those named, by name.

    Arrays of texts or `bytes` travel as BYTES and come back as object arrays of `bytes`. BF16 outputs are widened to
    float32.
    """
    reference = ModelReference.parse(model)
    # The protocol knows no aliases; a worker takes one where the protocol has the version.
    selector = "" if reference.alias == DEFAULT_ALIAS else str(reference.model_version or reference.alias)
    request = infer_request(reference.model, selector, inputs)
    for name in outputs:
        request.outputs.add(name=name)
    response = yield from ask(MODEL_INFER, request, timeout_s, affinity_key=affinity_key)
    return infer_outputs(response)


def _sigmoid(logits: Sequence[float]) -> list[float]:
    """Return the probabilities that a worker makes of logits: float32, as it does."""
    raw = np.array(logits, np.float32)
    probabilities: list[float] = (np.exp(np.minimum(raw, 0)) / (1 + np.exp(-np.abs(raw)))).tolist()
    return probabilities


def _inputs(
    texts: Sequence[str], token_ids: Sequence[npt.ArrayLike]
) -> tuple[list[int], Callable[[slice], pb.TokenIds | None]]:
    """Return the bytes of each text or sequence, and what makes the message of a slice of the sequences."""
    if not len(token_ids):
        return text_sizes(texts, "texts"), lambda _: None
    if len(texts):
        raise InvalidInputError("Both texts and token_ids are given. Give one of them.", field="token_ids")
    try:
        arrays = [as_ids(sequence) for sequence in token_ids]
    except ValueError as error:
        raise InvalidInputError(f"token_ids: {error}.", field="token_ids") from error

    def message(part: slice) -> pb.TokenIds:
        ids, lengths = pack_sequences(arrays[part])
        return pb.TokenIds(ids=ids, lengths=lengths)

    return [array.nbytes for array in arrays], message


def truncation_value(name: Truncation) -> tokenizer_pb2.Truncation.ValueType:
    """Return the protocol's value. Raises InvalidInputError for an unknown name."""
    if name not in _TRUNCATION:
        raise InvalidInputError(f"truncation is {name!r}. Use one of {', '.join(_TRUNCATION)}.", field="truncation")
    return _TRUNCATION[name]


def aggregation_value(name: Aggregation | None) -> pb.Aggregation.ValueType:
    """Return the protocol's value. Raises InvalidInputError for an unknown name."""
    if name is None:
        return pb.AGGREGATION_UNSPECIFIED
    if name not in get_args(Aggregation):
        raise InvalidInputError(
            f"aggregation is {name!r}. Use one of {', '.join(get_args(Aggregation))}.", field="aggregation"
        )
    return pb.Aggregation.Value(f"AGGREGATION_{name.upper()}")


def windowing_message(stride: int | None) -> tokenizer_pb2.Windowing | None:
    """Return the message, or none for a text that is to be cut instead."""
    return None if stride is None else tokenizer_pb2.Windowing(stride=stride)


def _usage(usage: pb.TextUsage) -> TextUsage:
    return TextUsage(usage.token_count, usage.truncated, usage.window_count)
