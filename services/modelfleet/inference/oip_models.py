"""
How the Open Inference Protocol sees a model: its inputs and outputs as tensors, and an inference on them.

`tensor` models are seen as their graph is. Text models take texts as BYTES, so that their clients need no tokenizer:

- embed: `text` BYTES [n] or [n, 1] -> `embeddings` FP32 [n, dimensions]
- classify: `text` -> `scores` FP32 [n, labels] and `labels` BYTES [n, labels], best first
- entities: `text` -> `entities` BYTES [n, 1], each a JSON list of objects with label, text, start, end, score
- rerank: `query` BYTES [1], `documents` BYTES [n] -> `scores` FP32 [n], in the order of the documents

Responses say in the parameters `token_counts`, `truncated` and `window_counts` what was done with each text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modelfleet.bundle.manifest import Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.models import HeldModel, TensorModel, TextModel
from modelfleet.inference.oip_parameters import InferParameters
from modelfleet.inference.pipeline import Pipeline, TextInput
from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.inference.tokens import TextUsage
from modelfleet.runtime.errors import InvalidInputError, WrongTaskError

_BYTES = np.dtype(np.object_)
_FP32 = np.dtype(np.float32)
_TEXT = TensorSpec("text", _BYTES, (None, 1))


@dataclass(frozen=True, slots=True)
class Signature:
    """
    A model's tensors, batch dimension included. `batches`: whether the first dimension is one, with others behind it.

    A configuration leaves the batch dimension out. Where nothing would be left, as for batches of scalars, it gives the
    whole shape, and `batches` is False.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: bool


def signature(model: HeldModel) -> Signature:
    """Return how a loaded model is seen."""
    if isinstance(model, TensorModel):
        inputs, outputs = model.session.inputs, model.session.outputs
        return Signature(inputs, outputs, model.batches and all(len(spec.shape) > 1 for spec in (*inputs, *outputs)))
    if not isinstance(model, TextModel):
        raise _no_form(model)
    labels = len(model.manifest.labels)
    match model.manifest.task:
        case Task.EMBED:
            dimensions = model.output.shape[-1]
            return Signature((_TEXT,), (TensorSpec("embeddings", _FP32, (None, dimensions)),), batches=True)
        case Task.CLASSIFY:
            scores = TensorSpec("scores", _FP32, (None, labels))
            return Signature((_TEXT,), (scores, TensorSpec("labels", _BYTES, (None, labels))), batches=True)
        case Task.ENTITIES:
            return Signature((_TEXT,), (TensorSpec("entities", _BYTES, (None, 1)),), batches=True)
        case Task.RERANK:
            query, documents = TensorSpec("query", _BYTES, (1,)), TensorSpec("documents", _BYTES, (None,))
            return Signature((query, documents), (TensorSpec("scores", _FP32, (None,)),), batches=False)
        case _:
            raise _no_form(model)


def _no_form(model: HeldModel) -> WrongTaskError:
    return WrongTaskError(
        f"{model.name} is a model of the task {model.manifest.task.value!r}, which this protocol has no form for.",
        field="model_name",
    )


async def infer(
    pipeline: Pipeline,
    reference: ModelReference,
    task: Task,
    inputs: Mapping[str, Array],
    parameters: InferParameters,
) -> tuple[VersionKey, dict[str, Array], Sequence[TextUsage]]:
    """
    Return the version that answered, its outputs by name, and what was done with each text.

    Inputs hold texts as `str`, outputs as `bytes`.
    """
    deadline = parameters.deadline
    match task:
        case Task.EMBED:
            text = _texts(inputs, parameters)
            embedded = await pipeline.embed(
                reference, text, deadline=deadline, dimensions=parameters.dimensions, normalize=parameters.normalize
            )
            return embedded.version, {"embeddings": embedded.vectors}, embedded.usage
        case Task.CLASSIFY:
            text = _texts(inputs, parameters)
            classified = await pipeline.classify(reference, text, deadline=deadline, top_k=parameters.top_k)
            scores = np.array([[one.score for one in labels] for labels in classified.labels], np.float32)
            names = np.array([[one.label.encode() for one in labels] for labels in classified.labels], object)
            return classified.version, {"scores": scores, "labels": names}, classified.usage
        case Task.ENTITIES:
            text = _texts(inputs, parameters)
            extracted = await pipeline.extract_entities(
                reference,
                text,
                deadline=deadline,
                min_score=parameters.min_score,
                aggregation=parameters.aggregation,
            )
            lists: Any = [
                [json.dumps([asdict(entity) for entity in found], ensure_ascii=False).encode()]
                for found in extracted.entities
            ]
            return extracted.version, {"entities": np.array(lists, object)}, extracted.usage
        case Task.RERANK:
            _only(inputs, "query", "documents")
            query, documents = _strings(inputs, "query"), _strings(inputs, "documents")
            if len(query) != 1:
                raise InvalidInputError(f"The input 'query' has {len(query)} elements. Give one.", field="inputs")
            text = TextInput(documents, truncation=parameters.truncation, stride=parameters.stride)
            ranked = await pipeline.rerank(reference, query[0], text, deadline=deadline, raw=parameters.raw_scores)
            by_document = np.zeros(len(documents), np.float32)
            for document in ranked.documents:
                by_document[document.index] = document.score
            return ranked.version, {"scores": by_document}, ranked.usage
        case _:
            inferred = await pipeline.infer(reference, inputs, deadline=deadline)
            return inferred.version, inferred.outputs, ()


def _texts(inputs: Mapping[str, Array], parameters: InferParameters) -> TextInput:
    _only(inputs, "text")
    return TextInput(_strings(inputs, "text"), truncation=parameters.truncation, stride=parameters.stride)


def _only(inputs: Mapping[str, Array], *names: str) -> None:
    if unknown := sorted(set(inputs) - set(names)):
        raise InvalidInputError(
            f"The model has no input {unknown[0]!r}. Its inputs are {', '.join(names)}.", field="inputs"
        )


def _strings(inputs: Mapping[str, Array], name: str) -> list[str]:
    array = inputs.get(name)
    if array is None:
        raise InvalidInputError(
            f"The input {name!r} is missing; there are {', '.join(inputs) or 'none'}.", field="inputs"
        )
    if array.dtype != _BYTES:
        raise InvalidInputError(f"The input {name!r} holds {array.dtype}. Send texts as BYTES.", field="inputs")
    if array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 1):  # noqa: PLR2004  [n] or [n, 1]
        raise InvalidInputError(
            f"The input {name!r} has the shape {list(array.shape)}. Send texts as [n] or [n, 1].", field="inputs"
        )
    texts: list[str] = array.ravel().tolist()
    return texts
