"""
Labelled spans of characters, from labels of tokens.

Labels are read in the schemes BIO (Ramshaw and Marcus 1995), BIOES, BILOU and BMES: `B-X` begins an entity of type X;
`I-X` and `M-X` are inside; `E-X` and `L-X` are its last token; `S-X` and `U-X` are all of it; `O` is outside. `B-` and
`I-` always are such prefixes, the others where the labels have one of these two for the same type. Any other label,
such as `credit-card` or `E-mail`, is a type as it stands, whose neighbours are one entity.

Models label pieces of words, and were often taught the first piece only: pieces of one type that touch are one entity
whatever their prefixes. Not so where a token begins with a Chinese or Japanese character, which touches the word before
it; there the prefixes hold.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from modelfleet.bundle.manifest import Aggregation
from modelfleet.inference.tasks.labelled_windows import LabelledWindow, joined
from modelfleet.inference.tasks.words import is_unspaced, words

_SCHEMED = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
_ANYWHERE = ("B", "I")
_CONTINUING = ("I", "M", "E", "L")
_ENDING = ("E", "L", "S", "U")
_OUTSIDE = ("O", "")


@dataclass(frozen=True, slots=True)
class Entity:
    """Characters `start` to `end` of a text, and what they are."""

    label: str
    text: str
    start: int
    end: int
    score: float


def extract(
    text: str,
    windows: Sequence[LabelledWindow],
    labels: Sequence[str],
    min_score: float,
    aggregation: Aggregation = Aggregation.FIRST,
) -> list[Entity]:
    """Return the entities of a text in order. Of overlapping windows, each token is read where it has more context."""
    tokens = words(text, joined(text, windows), aggregation)
    kinds = _parsed(tuple(labels))
    best = tokens.probabilities.argmax(axis=1)
    inside = np.flatnonzero(np.array([kind != _OUTSIDE for kind in kinds])[best])
    scores = tokens.probabilities[inside, best[inside]].tolist()
    spans: list[_Span] = []
    previous = -2
    for position, label, score, (start, end) in zip(
        inside.tolist(), best[inside].tolist(), scores, tokens.offsets[inside].tolist(), strict=True
    ):
        prefix, kind = kinds[label]
        last = spans[-1] if position == previous + 1 else None
        if last and last.kind == kind and (last.is_continued_by(prefix) or _of_one_word(text, last.end, start)):
            last.extend(prefix, end, score)
        else:
            spans.append(_Span(kind, prefix, start, end, [score]))
        previous = position
    entities = [Entity(span.kind, text[span.start : span.end], span.start, span.end, span.score) for span in spans]
    return [entity for entity in entities if entity.score >= min_score]


@lru_cache(64)
def _parsed(labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return prefix and type of each label; the prefix of a label that has none is I, which continues its like."""
    schemed = [_SCHEMED.fullmatch(label) for label in labels]
    types = {match[2] for match in schemed if match and match[1] in _ANYWHERE}
    return [
        (match[1], match[2]) if match and match[2] in types else _OUTSIDE if label == _OUTSIDE[0] else ("I", label)
        for label, match in zip(labels, schemed, strict=True)
    ]


def _of_one_word(text: str, end: int, start: int) -> bool:
    """Whether a token that begins at `start` is a piece of the word of the one that ended at `end`."""
    return start < end or (start == end and not is_unspaced(text, start))


@dataclass(slots=True)
class _Span:
    kind: str
    prefix: str  # of its last token
    start: int
    end: int
    scores: list[float]

    def is_continued_by(self, prefix: str) -> bool:
        return prefix in _CONTINUING and self.prefix not in _ENDING

    def extend(self, prefix: str, end: int, score: float) -> None:
        self.prefix = prefix
        self.end = max(self.end, end)
        self.scores.append(score)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)
