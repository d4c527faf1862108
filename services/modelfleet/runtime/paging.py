"""Pages of a list: how many entries, from where on, and the opaque token that names the next."""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from modelfleet.runtime.errors import InvalidInputError, quoted

_DEFAULT_SIZE = 100
_LARGEST_SIZE = 1000
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class PageRequest:
    """What a caller asks for: at most `size` entries (0 for 100, never more than 1000) after those before `token`."""

    size: int = 0
    token: str = ""

    @property
    def limit(self) -> int:
        """Most entries to return. Raises InvalidInputError when the size is negative."""
        if self.size < 0:
            raise InvalidInputError(
                f"page_size is {self.size}. Give 0 for {_DEFAULT_SIZE}, or more.", field="page_size"
            )
        return min(self.size or _DEFAULT_SIZE, _LARGEST_SIZE)

    def after(self, listing: str) -> str | None:
        """Return the key of the last entry of the page before. Raises InvalidInputError unless it is of `listing`."""
        if not self.token:
            return None
        try:
            of, _, key = base64.urlsafe_b64decode(self.token).decode().partition("\n")
        except ValueError:
            of, key = "", ""
        if of != listing or _token(listing, key) != self.token:
            raise self._bad()
        return key

    def after_number(self, listing: str) -> int | None:
        """Return the same for a list whose keys are numbers from 1."""
        key = self.after(listing)
        if key is not None and not _NUMBER.fullmatch(key):
            raise self._bad()
        return None if key is None else int(key)

    def after_version(self, listing: str) -> tuple[str, int] | None:
        """Return the same for a list whose keys are `model@number`."""
        key = self.after(listing)
        if key is None:
            return None
        model, _, number = key.rpartition("@")
        if not _NUMBER.fullmatch(number):
            raise self._bad()
        return model, int(number)

    def _bad(self) -> InvalidInputError:
        return InvalidInputError(
            f"page_token {quoted(self.token)} is not one that this list returned. "
            "Give next_page_token of the page before, or none for the first page.",
            field="page_token",
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[_Item]):
    """Entries, and the token of the next page, empty after the last."""

    items: tuple[_Item, ...]
    next_token: str

    @classmethod
    def cut(cls, items: Sequence[_Item], limit: int, listing: str, key: Callable[[_Item], object]) -> "Page[_Item]":
        """Make a page of at most `limit` entries from `items`, which hold one more when more follow."""
        kept = tuple(items[:limit])
        return cls(kept, _token(listing, str(key(kept[-1]))) if len(items) > limit else "")


def _token(listing: str, key: str) -> str:
    return base64.urlsafe_b64encode(f"{listing}\n{key}".encode()).decode()
