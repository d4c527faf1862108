"""Labelled data: what a model is asked, and what it should have answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import orjson
from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.batch.rows import RowError, RowReader, Values
from modelfleet_tools.batch.sources import find_sources
from modelfleet_tools.batch.tasks import Columns, Inputs, read_inputs


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A labelled part of a text, in characters; `end` is exclusive."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answer to one example; which field holds it is the task's."""

    label: str = ""
    spans: tuple[Span, ...] = ()
    relevance: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the data."""

    place: str
    inputs: Inputs
    expected: Expected


LABEL_COLUMNS = {"classify": "label", "entities": "entities", "rerank": "relevance"}
_TOKENS, _TAGS = "tokens", "tags"


@dataclass(frozen=True, slots=True)
class Data:
    """
    Where examples are.

    `label_column` is the task's own name for it unless given; `renamed` says which label of the
    data is which of the model; at most `limit` examples are taken unless that is 0.
    """

    url: str
    columns: Columns = field(default_factory=Columns)
    label_column: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    limit: int = 0


def read_examples(data: Data, task: str) -> list[Example]:
    """
    Return the examples of JSONL, CSV or Parquet files.

    The label column has a label for `classify`; for `entities` a list of objects with `start`, `end`, `label`, unless
    rows have `tokens` and `tags` (BIO) instead; for `rerank` a list with a gain for each document, 0 for irrelevant.
    Raises InvalidInputError, naming the place, for the first row that is not so.
    """
    examples: list[Example] = []
    for found in RowReader(find_sources(data.url), ()):
        if data.limit and len(examples) == data.limit:
            break
        try:
            examples.append(_example(found.place, found.parse(), task, data))
        except RowError as error:
            raise InvalidInputError(f"{found.place}: {error}") from error
    if not examples:
        raise InvalidInputError(f"{data.url} holds no rows.")
    return examples


def check_labels(task: str, examples: Sequence[Example], model: str, labels: Sequence[str]) -> None:
    """Raise InvalidInputError when the data has labels that the model cannot give."""
    if task == "rerank":
        return
    known = {label.removeprefix("B-").removeprefix("I-") if task == "entities" else label for label in labels}
    given = {example.expected.label for example in examples} if task == "classify" else set()
    given |= {span.label for example in examples for span in example.expected.spans}
    if unknown := sorted(given - known):
        raise InvalidInputError(
            f"The data has labels that {model} does not: {', '.join(unknown)}. The model has "
            f"{', '.join(sorted(known - {'O'}))}. Say which is which with --rename {unknown[0]}=LABEL."
        )


def _example(place: str, values: Values, task: str, data: Data) -> Example:
    label_column = data.label_column or LABEL_COLUMNS[task]
    if task == "entities" and label_column not in values and _TOKENS in values:
        text, spans = _from_tags(_list(values, _TOKENS), _list(values, _TAGS), data.renamed)
        return Example(place, Inputs((text,)), Expected(spans=spans))
    inputs = read_inputs(task, values, data.columns)
    if label_column not in values:
        have = ", ".join(map(repr, values))
        raise RowError(f"The row has no {label_column!r}. It has {have}. Say which to take with --label-column.")
    match task:
        case "classify":
            label = str(values[label_column])
            return Example(place, inputs, Expected(label=data.renamed.get(label, label)))
        case "entities":
            spans = _spans(_list(values, label_column), inputs.texts[0], data.renamed)
            return Example(place, inputs, Expected(spans=spans))
    gains = _list(values, label_column)
    relevance = tuple(float(gain) for gain in gains if isinstance(gain, int | float) and gain >= 0)
    if not len(relevance) == len(gains) == len(inputs.texts):
        raise RowError(f"{label_column!r} is not a gain of 0 or more for each of the {len(inputs.texts)} documents.")
    return Example(place, inputs, Expected(relevance=relevance))


def _list(values: Values, column: str) -> list[object]:
    value = values.get(column)
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RowError(f"{column!r} is no JSON list: {error}.") from error
    if not isinstance(value, list):
        raise RowError(f"{column!r} is no list.")
    return value


def _spans(listed: Sequence[object], text: str, renamed: Mapping[str, str]) -> tuple[Span, ...]:
    spans = []
    for one in listed:
        match one:
            case {"start": int(start), "end": int(end), "label": str(label)} if 0 <= start < end <= len(text):
                spans.append(Span(start, end, renamed.get(label, label)))
            case _:
                raise RowError(
                    f"{one!r} is no entity of a text of {len(text)} characters: start, end (exclusive), label."
                )
    spans.sort()
    for before, after in pairwise(spans):
        if after.start < before.end:
            raise RowError(f"The entities at {before.start} and {after.start} overlap.")
    return tuple(spans)


def _from_tags(
    tokens: Sequence[object], tags: Sequence[object], renamed: Mapping[str, str]
) -> tuple[str, tuple[Span, ...]]:
    """Return the tokens joined by spaces, and the spans that their BIO tags mark."""
    if len(tokens) != len(tags):
        raise RowError(f"There are {len(tokens)} tokens and {len(tags)} tags.")
    spans: list[Span] = []
    position, previous = 0, "O"
    for token, tag in zip(map(str, tokens), map(str, tags), strict=True):
        end = position + len(token)
        prefix, _, label = tag.partition("-")
        label = renamed.get(label, label)
        if prefix == "I" and previous.partition("-")[2] == tag.partition("-")[2] and previous != "O":
            spans[-1] = Span(spans[-1].start, end, label)
        elif prefix in ("B", "I"):
            spans.append(Span(position, end, label))
        position, previous = end + 1, tag
    return " ".join(map(str, tokens)), tuple(spans)
