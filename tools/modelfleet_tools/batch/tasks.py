"""What a row asks of each task, and what comes of it: the columns of the output."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
import pyarrow as pa
from modelfleet.client import AsyncClient
from modelfleet.client.answers import TextUsage
from modelfleet.client.inference_calls import Truncation

from modelfleet_tools.batch.rows import RowError, Values

TEXT_TASKS = ("embed", "classify", "entities")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the input are what. `kept` are copied to the output."""

    text: str = "text"
    query: str = "query"
    documents: str = "documents"
    kept: tuple[str, ...] = ()

    def needed(self, task: str) -> tuple[str, ...]:
        """Return those that rows of a task must have."""
        return (*((self.text,) if task in TEXT_TASKS else (self.query, self.documents)), *self.kept)


@dataclass(frozen=True, slots=True)
class Options:
    """How to ask; those that a task does not know are left at their defaults."""

    normalize: bool | None = None
    dimensions: int = 0
    top_k: int = 0
    min_score: float = 0.0
    raw_scores: bool = False
    truncation: Truncation = "right"
    window_stride: int | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one row asks with: one text, or documents with the query that they are ranked for."""

    texts: tuple[str, ...]
    query: str = ""

    @property
    def characters(self) -> int:
        """How much text it is; a query goes with each document."""
        return sum(map(len, self.texts)) + len(self.query) * len(self.texts)


@dataclass(frozen=True, slots=True)
class Result:
    """The columns that a row's answer fills, and what it cost."""

    values: Mapping[str, object]
    tokens: int
    truncated: bool


Ask: TypeAlias = Callable[[Sequence[Inputs]], Coroutine[Any, Any, list[Result]]]

_LABELS = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
_ENTITIES = pa.list_(
    pa.struct(
        [
            ("label", pa.string()),
            ("text", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("score", pa.float32()),
        ]
    )
)
_DOCUMENTS = pa.list_(pa.struct([("index", pa.int32()), ("score", pa.float32())]))
_USAGE = [("tokens", pa.int64()), ("truncated", pa.bool_())]
_RESULTS = {
    "embed": [("vector", pa.list_(pa.float32()))],
    "classify": [("label", pa.string()), ("score", pa.float32()), ("labels", _LABELS)],
    "entities": [("entities", _ENTITIES)],
    "rerank": [("documents", _DOCUMENTS)],
}


def output_schema(task: str, kept: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return the columns of the output: the row's number, what is kept of it, the result, what it cost."""
    return pa.schema([("row", pa.int64()), *kept.items(), *_RESULTS[task], *_USAGE])


def read_inputs(task: str, values: Values, columns: Columns) -> Inputs:
    """Return what a row asks with. Raises RowError for what is not there or is no text."""
    if task in TEXT_TASKS:
        return Inputs((_text(values, columns.text),))
    documents = _present(values, columns.documents)
    if isinstance(documents, str) and documents.startswith("["):
        try:
            documents = orjson.loads(documents)
        except orjson.JSONDecodeError as error:
            raise RowError(f"{columns.documents!r} is no JSON list of texts: {error}.") from error
    listed = [documents] if isinstance(documents, str) else documents
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
        raise RowError(f"{columns.documents!r} is neither a text nor a list of texts.")
    return Inputs(tuple(listed), _text(values, columns.query))


def asker(client: AsyncClient, task: str, model: str, options: Options, timeout_s: float) -> Ask:
    """Return what sends the inputs of several rows (of one row for rerank) and returns their results in order."""
    cuts: dict[str, Any] = {
        "truncation": options.truncation,
        "window_stride": options.window_stride,
        "timeout_s": timeout_s,
    }

    async def embed(inputs: Sequence[Inputs]) -> list[Result]:
        answer = await client.embed(
            model, _texts(inputs), normalize=options.normalize, dimensions=options.dimensions, **cuts
        )
        return [_result({"vector": v}, usage) for v, usage in zip(answer.vectors, answer.usage, strict=True)]

    async def classify(inputs: Sequence[Inputs]) -> list[Result]:
        answer = await client.classify(model, _texts(inputs), top_k=options.top_k, **cuts)
        return [
            _result(
                {
                    "label": one.labels[0].label,
                    "score": one.labels[0].score,
                    "labels": [{"label": label.label, "score": label.score} for label in one.labels],
                },
                one.usage,
            )
            for one in answer.results
        ]

    async def entities(inputs: Sequence[Inputs]) -> list[Result]:
        answer = await client.extract_entities(model, _texts(inputs), min_score=options.min_score, **cuts)
        return [
            _result(
                {
                    "entities": [
                        {"label": e.label, "text": e.text, "start": e.start, "end": e.end, "score": e.score}
                        for e in one.entities
                    ]
                },
                one.usage,
            )
            for one in answer.results
        ]

    async def rerank(inputs: Sequence[Inputs]) -> list[Result]:
        (one,) = inputs
        answer = await client.rerank(
            model, one.query, one.texts, top_k=options.top_k, raw_scores=options.raw_scores, **cuts
        )
        found = [{"index": document.index, "score": document.score} for document in answer.documents]
        return [_result({"documents": found}, *(document.usage for document in answer.documents))]

    return {"embed": embed, "classify": classify, "entities": entities, "rerank": rerank}[task]


def _texts(inputs: Sequence[Inputs]) -> list[str]:
    return [text for one in inputs for text in one.texts]


def _result(values: Mapping[str, object], *usages: TextUsage) -> Result:
    return Result(values, sum(usage.token_count for usage in usages), any(usage.truncated for usage in usages))


def _present(values: Values, column: str) -> object:
    if column not in values:
        raise RowError(f"The row has no {column!r}. It has {', '.join(map(repr, values)) or 'nothing'}.")
    return values[column]


def _text(values: Values, column: str) -> str:
    value = _present(values, column)
    if not isinstance(value, str):
        raise RowError(f"{column!r} is {'null' if value is None else 'of the type ' + type(value).__name__}, no text.")
    if not value:
        raise RowError(f"{column!r} is empty.")
    return value
