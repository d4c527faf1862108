"""Rows that have no answer, told to the caller as the elements of its request that they come from."""

from collections.abc import Iterable, Mapping

import numpy as np

from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidInputError, ModelfleetError

_NAMED = 3


def check_vocabulary(tokens: Tokens, vocabulary_size: int | None, field: str) -> None:
    """Raise InvalidInputError, naming each of them, for texts with tokens that the model has no vectors of."""
    if vocabulary_size is None or not len(tokens.ids) or int(tokens.ids.max()) < vocabulary_size:
        return
    outside = np.flatnonzero(tokens.ids >= vocabulary_size)
    rows = np.searchsorted(tokens.starts, outside, side="right") - 1
    texts = _texts(np.unique(rows).tolist(), tokens)
    raise InvalidInputError(
        f"{_listed(texts, field)}: the token id {int(tokens.ids[outside[0]])} is outside the model's vocabulary, which "
        f"has {vocabulary_size} ids, though its tokenizer makes it. Leave out the special token that the text spells.",
        fields=_named(texts, field),
    )


def of_texts(errors: Mapping[int, ModelfleetError], tokens: Tokens, field: str) -> ModelfleetError:
    """Return the error of the first of the rows that failed, in the words of the texts, named `field`, they are of."""
    return _told(errors, _texts(errors, tokens), field)


def of_elements(errors: Mapping[int, ModelfleetError], field: str) -> ModelfleetError:
    """Return the error of the first of the rows that failed, where each is an element of `field`."""
    return _told(errors, list(errors), field)


def _told(errors: Mapping[int, ModelfleetError], indexes: list[int], field: str) -> ModelfleetError:
    first = next(iter(errors.values()))
    return type(first)(f"{_listed(indexes, field)}: {first.message}", fields=_named(indexes, field))


def _texts(rows: Iterable[int], tokens: Tokens) -> list[int]:
    """Return the texts that rows are windows of."""
    ends = np.cumsum(tokens.window_counts)
    texts: list[int] = np.unique(np.searchsorted(ends, list(rows), side="right")).tolist()
    return texts


def _named(indexes: list[int], field: str) -> list[str]:
    return [f"{field}[{index}]" for index in indexes]


def _listed(indexes: list[int], field: str) -> str:
    named = ", ".join(_named(indexes[:_NAMED], field))
    return named if len(indexes) <= _NAMED else f"{named} and {len(indexes) - _NAMED} more"
