"""
Labels of whole words, from those of their tokens.

Models label pieces of words, and often not alike: "Brenn" a name and "##an" a place. The ways to one label for a word
are those of the transformers library (`aggregation_strategy` of its TokenClassificationPipeline).
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.manifest import Aggregation
from modelfleet.inference.tasks.labelled_windows import LabelledWindow

# Ideographs, Hiragana and Katakana: words of these are written without blanks between them.
_UNSPACED = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def words(text: str, tokens: LabelledWindow, aggregation: Aggregation) -> LabelledWindow:
    """Return one token a word, with its characters and the probabilities of its labels; SIMPLE leaves tokens alone."""
    if aggregation is Aggregation.SIMPLE or not len(tokens.offsets):
        return tokens
    starts, ends = tokens.offsets[:, 0].tolist(), tokens.offsets[:, 1].tolist()
    firsts = np.array([0, *(at for at in range(1, len(starts)) if not _in_a_word(text, ends[at - 1], starts[at]))])
    offsets = np.stack((tokens.offsets[firsts, 0], np.maximum.reduceat(tokens.offsets[:, 1], firsts)), axis=1)
    return LabelledWindow(_WAYS[aggregation](tokens.probabilities, firsts), offsets)


def is_unspaced(text: str, start: int) -> bool:
    """Whether a character is of a script that writes words without blanks between them."""
    return _UNSPACED.match(text, start) is not None


def _in_a_word(text: str, end: int, start: int) -> bool:
    """Whether a token that begins at `start` goes on with the word of the one that ended at `end`."""
    if start < end:
        return True
    if start > end:
        return False
    return _is_of_words(text[end - 1]) and _is_of_words(text[start]) and not is_unspaced(text, start)


def _is_of_words(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _first(probabilities: NDArray[np.float32], firsts: NDArray[np.int64]) -> NDArray[np.float32]:
    return probabilities[firsts]


def _average(probabilities: NDArray[np.float32], firsts: NDArray[np.int64]) -> NDArray[np.float32]:
    counts = np.diff(np.append(firsts, len(probabilities)))
    sums: NDArray[np.float32] = np.add.reduceat(probabilities, firsts, axis=0)
    return (sums / counts[:, None]).astype(np.float32)


def _max(probabilities: NDArray[np.float32], firsts: NDArray[np.int64]) -> NDArray[np.float32]:
    surest = probabilities.max(axis=1)
    ends = np.append(firsts[1:], len(probabilities))
    chosen = [
        first + int(surest[first:end].argmax()) for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)
    ]
    return probabilities[chosen]


_WAYS: Mapping[Aggregation, Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]] = MappingProxyType(
    {Aggregation.FIRST: _first, Aggregation.AVERAGE: _average, Aggregation.MAX: _max}
)
