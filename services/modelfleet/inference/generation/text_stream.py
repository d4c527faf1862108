"""One continuation's text: from token ids that arrive in pieces to characters that are safe to print."""

from collections.abc import Sequence
from dataclasses import dataclass, field

# What stands for bytes that are no character, or not yet one.
_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes: with as many, they are one, or never will be.
_MOST_BYTES_IN_WAIT = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to send now, and the stop string that ends the continuation, if one does."""

    text: str
    stop: str | None = None


@dataclass(slots=True)
class StopStrings:
    """
    Cuts a text that arrives in pieces exactly before a stop string.

    Of several, that one counts which is complete first, and of those the longest: so the pieces make no difference.
    """

    stops: Sequence[str]
    _held: str = ""

    def add(self, text: str) -> Piece:
        """Take the next piece; return what cannot be part of a stop string any more."""
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self.stops if (start := held.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return Piece(held[:start], stop)
        keep = max((self._overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - keep :]
        return Piece(held[: len(held) - keep])

    def rest(self) -> str:
        """Return what was held back; nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return how many of the last characters of `text` may begin `stop`."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(slots=True)
class TextStream:
    """
    Turns token ids into text as they come.

    What a token adds depends on those before it, so each decoding covers a few that were sent already as well, and the
    difference is new. At first these are the last ids of the prompt, `ids`.
    """

    stops: StopStrings
    ids: list[int]
    _context: int = 0
    _printed: int = 0
    """Characters that were returned already of those after `_sent`, where the last one was not whole."""
    _sent: int = field(init=False)
    _asked: int = field(init=False)

    def __post_init__(self) -> None:
        self._sent = self._asked = len(self.ids)

    def windows(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take new ids; return those to decode: ones whose text was sent, and the same with those that follow."""
        self.ids.extend(ids)
        self._asked = len(self.ids)
        return self.ids[self._context : self._sent], self.ids[self._context : self._asked]

    def advance(self, known: str, whole: str, *, last: bool) -> Piece:
        """Take the texts of both; return what may be printed. `last`: no ids follow; half a character is dropped."""
        complete = _complete_length(whole)
        new = whole[len(known) + self._printed : complete]
        self._printed += len(new)
        if complete == len(whole):
            self._context, self._sent, self._printed = self._sent, self._asked, 0
        piece = self.stops.add(new)
        if last and piece.stop is None:
            return Piece(piece.text + self.stops.rest())
        return piece


def _complete_length(text: str) -> int:
    """Return how many characters are whole: those at the end that stand for single bytes may yet become one."""
    replaced = len(text) - len(text.rstrip(_REPLACEMENT))
    return len(text) - min(replaced, _MOST_BYTES_IN_WAIT)
