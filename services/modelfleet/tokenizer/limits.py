"""How much one request may ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

from modelfleet.runtime.errors import InvalidInputError

_MOST_BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `max_texts` texts or sequences in a request; `max_text_bytes` is of each text, in UTF-8."""

    max_texts: int
    max_text_bytes: int

    def check_texts(self, texts: Sequence[str], pairs: Sequence[str]) -> None:
        """Raise InvalidInputError unless there are texts, as many pairs or none, and none too large."""
        self.check_count(len(texts), field="texts")
        if pairs and len(pairs) != len(texts):
            raise InvalidInputError(
                f"There are {len(texts)} texts but {len(pairs)} pairs. Give none, or one for each text.", field="pairs"
            )
        for field, values in (("texts", texts), ("pairs", pairs)):
            for index, text in enumerate(values):
                self._check_size(text, f"{field}[{index}]")

    def check_count(self, count: int, *, field: str) -> None:
        """Raise InvalidInputError unless there is at least one and not too many."""
        if not count:
            raise InvalidInputError(f"{field} is empty. Give at least one.", field=field)
        if count > self.max_texts:
            raise InvalidInputError(
                f"{field} has {count}, but one request may have {self.max_texts}. Split the request.", field=field
            )

    def _check_size(self, text: str, field: str) -> None:
        if len(text) * _MOST_BYTES_OF_A_CHARACTER <= self.max_text_bytes:
            return
        size = len(text.encode())
        if size > self.max_text_bytes:
            raise InvalidInputError(
                f"{field} has {size} bytes, but a text may have {self.max_text_bytes}. Split it.", field=field
            )
