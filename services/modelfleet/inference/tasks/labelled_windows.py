"""The labelled tokens of a text, from the windows that cover it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Offsets = NDArray[np.int32]

# Joins emoji to one.
_JOINER = "\u200d"


@dataclass(frozen=True, slots=True)
class LabelledWindow:
    """The tokens of one window: probabilities [tokens, labels] and spans of characters [tokens, 2]."""

    probabilities: Floats
    offsets: Offsets


def joined(text: str, windows: Sequence[LabelledWindow]) -> LabelledWindow:
    """Return the tokens that cover characters, in order, each from the window in which it has more context."""
    return _joined([_without_blanks(text, window) for window in windows])


def _without_blanks(text: str, window: LabelledWindow) -> LabelledWindow:
    """Leave out special tokens, and the blanks that some tokenizers count to the word after them."""
    offsets = np.array([_trimmed(text, start, end) for start, end in window.offsets.tolist()], np.int32).reshape(-1, 2)
    covers_text = offsets[:, 1] > offsets[:, 0]
    return LabelledWindow(window.probabilities[covers_text], offsets[covers_text])


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return end - len(piece.lstrip()), _with_marks(text, start + len(piece.rstrip()))


def _with_marks(text: str, end: int) -> int:
    """
    Return where what ends at `end` ends with the marks on its last character, and all that is joined to that.

    Tokenizers drop accents that are characters of their own, and the second half of emoji: a mask is to cover them.
    """
    while 0 < end < len(text) and (unicodedata.combining(text[end]) or _is_mark(text[end])):
        end += 2 if text[end] == _JOINER else 1
    return min(end, len(text))


def _is_mark(character: str) -> bool:
    return character == _JOINER or (character > "\x7f" and unicodedata.category(character).startswith("M"))


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
