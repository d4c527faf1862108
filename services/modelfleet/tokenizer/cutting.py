"""Which tokens of an encoding that is too long are kept: in one cut, or in windows that cover it."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

Window: TypeAlias = tuple[slice, ...]
"""The tokens of one window: slices of the whole encoding, in order, each with both ends given."""


class Truncation(Enum):
    """What happens to a text with more tokens than are allowed, unless windows cover it."""

    RIGHT = auto()
    LEFT = auto()
    FORBIDDEN = auto()


@dataclass(frozen=True, slots=True)
class Layout:
    """
    Where the halves of a text lie in its encoding of `length` tokens; all between and around them are special.

    A half without tokens lies at the end. A single text has no second half.
    """

    length: int
    first: range
    second: range

    @property
    def special_tokens(self) -> int:
        """Tokens that belong to neither half."""
        return self.length - len(self.first) - len(self.second)


def truncated(layout: Layout, max_tokens: int, truncation: Truncation) -> Window:
    """Keep the special tokens and what else fits, of each half its beginning (RIGHT) or its end (LEFT)."""
    kept = kept_lengths(len(layout.first), len(layout.second), max_tokens - layout.special_tokens)
    position = 0
    window: list[slice] = []
    for half, keep in sorted(zip((layout.first, layout.second), kept, strict=True), key=lambda part: part[0].start):
        dropped = half[keep:] if truncation is Truncation.RIGHT else half[: len(half) - keep]
        window.append(slice(position, dropped.start))
        position = dropped.stop
    return (*window, slice(position, layout.length))


def kept_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Share `room` tokens, fewer than there are: the longer half is cut until both are alike, then both are."""
    shorter = min(first, second, room // 2)
    longer = room - shorter
    # Of two halves alike the library favours the second.
    return (longer, shorter) if first > second else (shorter, longer)


def window_room(layout: Layout, max_tokens: int) -> int:
    """Return the tokens of the half that is windowed, the last one that has any, beside all else in a window."""
    return max_tokens - (layout.length - len(layout.second or layout.first))


def covered(layout: Layout, max_tokens: int, stride: int) -> list[Window]:
    """Cover the last half that has tokens by windows of `max_tokens`; all else is in each. Needs stride < room."""
    windowed = layout.second or layout.first
    return [
        (slice(0, windowed.start), slice(part.start, part.stop), slice(windowed.stop, layout.length))
        for part in window_parts(windowed, window_room(layout, max_tokens), stride)
    ]


def covered_tokens(layout: Layout, max_tokens: int, stride: int) -> int:
    """Return how many tokens the windows of `covered` have together, without making them."""
    windowed = len(layout.second or layout.first)
    count = len(_starts(windowed, window_room(layout, max_tokens), stride))
    return count * (layout.length - windowed) + windowed + (count - 1) * stride


def window_parts(whole: range, room: int, stride: int) -> list[range]:
    """Cut `whole` into parts of `room`, neighbours sharing `stride`; the last one may be shorter."""
    return [whole[start : start + room] for start in _starts(len(whole), room, stride)]


def _starts(length: int, room: int, stride: int) -> range:
    return range(0, max(length - stride, 1), room - stride)
