"""What one request may hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from modelfleet.runtime.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most texts, or elements, of one request, and the largest text."""

    max_texts: int
    max_text_bytes: int

    def check_texts(self, texts: Sequence[str], *, field: str) -> None:
        """Raise InvalidInputError for no texts or too many, or for one that is empty or too large."""
        if not texts:
            raise InvalidInputError(f"{field} is empty. Give at least one text.", field=field)
        self.check_count(len(texts), "texts", field=field)
        for index, text in enumerate(texts):
            # A character has at most 4 bytes, so that short texts need not be encoded to be measured.
            if not text or 4 * len(text) > self.max_text_bytes:
                self.check_text(text, field=f"{field}[{index}]")

    def check_text(self, text: str, *, field: str) -> None:
        """Raise InvalidInputError for a text that is empty or too large."""
        if not text:
            raise InvalidInputError(f"{field} is empty. Give at least one character.", field=field)
        if (size := len(text.encode())) > self.max_text_bytes:
            raise InvalidInputError(
                f"{field} has {size} bytes; a text has at most {self.max_text_bytes}. Split it.", field=field
            )

    def check_count(self, count: int, of: str, *, field: str) -> None:
        """Raise InvalidInputError for too many of something that counts as texts do."""
        if count > self.max_texts:
            raise InvalidInputError(
                f"{field} has {count} {of}; one request takes at most {self.max_texts}. Send several.",
                field=field,
            )
