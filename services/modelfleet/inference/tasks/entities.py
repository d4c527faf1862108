"""
Labelled spans of characters, from labels of tokens.

Labels are written in the BIO scheme (Ramshaw and Marcus 1995): `B-X` begins an entity of type X, `I-X` continues it,
`O` is outside. Models label pieces of words, often each with its own `B-`: pieces of one type that touch are one
entity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Offsets = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Entity:
    """Characters `start` to `end` of a text, and what they are."""

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class LabelledWindow:
    """The tokens of one window: probabilities [tokens, labels] and spans of characters [tokens, 2]."""

    probabilities: Floats
    offsets: Offsets


def extract(text: str, windows: Sequence[LabelledWindow], labels: Sequence[str], min_score: float) -> list[Entity]:
    """Return the entities of a text in order. Of overlapping windows, each token is read where it has more context."""
    tokens = _joined([_without_special_tokens(window) for window in windows])
    kinds = [_parsed(label) for label in labels]
    best = tokens.probabilities.argmax(axis=1)
    inside = np.flatnonzero(np.array([prefix != "O" for prefix, _ in kinds])[best])
    scores = tokens.probabilities[inside, best[inside]].tolist()
    spans: list[_Span] = []
    previous = -2
    for position, label, score, (start, end) in zip(
        inside.tolist(), best[inside].tolist(), scores, tokens.offsets[inside].tolist(), strict=True
    ):
        prefix, kind = kinds[label]
        last = spans[-1] if position == previous + 1 else None
        if last and last.kind == kind and (prefix == "I" or start <= last.end):
            last.extend(end, score)
        else:
            spans.append(_Span(kind, start, end, [score]))
        previous = position
    entities = [Entity(span.kind, text[span.start : span.end], span.start, span.end, span.score) for span in spans]
    return [entity for entity in entities if entity.score >= min_score]


def _parsed(label: str) -> tuple[str, str]:
    """Return prefix and type; a label without a prefix is outside if it is O, and else a type of its own."""
    prefix, _, kind = label.partition("-")
    if kind or prefix == "O":
        return prefix, kind
    return "I", prefix


@dataclass(slots=True)
class _Span:
    kind: str
    start: int
    end: int
    scores: list[float]

    def extend(self, end: int, score: float) -> None:
        self.end = max(self.end, end)
        self.scores.append(score)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


def _without_special_tokens(window: LabelledWindow) -> LabelledWindow:
    covers_text = window.offsets[:, 1] > window.offsets[:, 0]
    return LabelledWindow(window.probabilities[covers_text], window.offsets[covers_text])


def _joined(windows: Sequence[LabelledWindow]) -> LabelledWindow:
    """Cut each overlap in its middle: every token is then read where it lies farther from an edge."""
    filled = [window for window in windows if len(window.offsets)] or windows[:1]
    # Characters at which reading passes from one window to the next.
    cuts = [0, *(_cut(before, after) for before, after in pairwise(filled)), np.iinfo(np.int32).max]
    read = [
        (window.offsets[:, 0] >= start) & (window.offsets[:, 0] < end)
        for window, (start, end) in zip(filled, pairwise(cuts), strict=True)
    ]
    return LabelledWindow(
        np.concatenate([window.probabilities[mask] for window, mask in zip(filled, read, strict=True)]),
        np.concatenate([window.offsets[mask] for window, mask in zip(filled, read, strict=True)]),
    )


def _cut(before: LabelledWindow, after: LabelledWindow) -> int:
    last = before.offsets[-1, 0]
    shared = int((after.offsets[:, 0] <= last).sum())
    middle = (shared + 1) // 2
    return int(after.offsets[middle, 0]) if middle < len(after.offsets) else int(last) + 1
