"""Model references: `name`, `name@alias`, `name@number`."""

import re
from dataclasses import dataclass
from typing import Self

from modelfleet.runtime.errors import InvalidInputError, quoted

DEFAULT_ALIAS = "stable"

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ALIAS_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model, and which of its versions: exactly one of `alias` and `model_version` is set."""

    model: str
    alias: str | None
    model_version: int | None

    @classmethod
    def parse(cls, text: str, *, field: str = "model") -> Self:
        """Read `name`, `name@alias` or `name@number`. Raises InvalidInputError that names `field`."""
        name, separator, selector = text.partition("@")
        check_model_name(name, field=field)
        if not separator:
            return cls(name, DEFAULT_ALIAS, None)
        if _NUMBER.fullmatch(selector):
            return cls(name, None, int(selector))
        check_alias_name(selector, field=field)
        return cls(name, selector, None)

    def __str__(self) -> str:
        return f"{self.model}@{self.model_version or self.alias}"


def check_model_name(name: str, *, field: str = "model") -> None:
    """Raise InvalidInputError unless `name` can name a model."""
    if not _MODEL_NAME.fullmatch(name):
        raise InvalidInputError(
            f"{quoted(name)} cannot name a model. Use lower-case letters, digits, '-', '_' and '.', "
            "at most 63 characters, a letter or digit first.",
            field=field,
        )


def check_alias_name(alias: str, *, field: str = "alias") -> None:
    """Raise InvalidInputError unless `alias` can name an alias."""
    if not _ALIAS_NAME.fullmatch(alias):
        raise InvalidInputError(
            f"{quoted(alias)} cannot name an alias. Use lower-case letters, digits and '-', at most 63 characters, "
            "a letter first; a number names a model version instead.",
            field=field,
        )
