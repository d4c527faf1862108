"""Batches larger than a message, sent as several calls that one model version answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from modelfleet.client.channel import DEFAULT_MAX_MESSAGE_BYTES
from modelfleet.client.steps import Method, Procedure, ask, ask_all
from modelfleet.runtime.errors import InvalidInputError

# Enough for full batches, few enough that each part's answer fits a message and each part gets its own deadline.
MAX_ITEMS = 256
# Half a message: the rest is room for servers that take less than the client sends.
MAX_BYTES = DEFAULT_MAX_MESSAGE_BYTES // 2


class Answer(Protocol):
    """A response that says which model version answered."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def model_version(self) -> int:
        """Its number."""


AnswerMessage = TypeVar("AnswerMessage", bound=Message)


def ask_in_parts(
    method: Method[AnswerMessage],
    model: str,
    sizes: Sequence[int],
    request: Callable[[str, slice], Message],
    timeout_s: float | None,
) -> Procedure[list[AnswerMessage]]:
    """
    Send items of the given `sizes` (bytes) in as few calls as they fit; return the responses in order.

    `request` makes the message for a model reference and a slice of the items. The version that answers the first part
    is named for all others, so that an alias which moves meanwhile does not mix two versions in one answer.
    """
    first, *rest = parts(sizes)
    response = yield from ask(method, request(model, first), timeout_s)
    if not rest:
        return [response]
    pinned = _reference(response)
    others = yield from ask_all(method, (request(pinned, part) for part in rest), timeout_s)
    return [response, *others]


def parts(sizes: Sequence[int], max_bytes: int = MAX_BYTES, max_items: int = MAX_ITEMS) -> list[slice]:
    """Return slices that cover all items in order, each within both limits unless a single item is larger."""
    found: list[slice] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (total + size > max_bytes or index - start >= max_items):
            found.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*found, slice(start, len(sizes))]


def text_sizes(texts: Sequence[str], field: str) -> list[int]:
    """Return the bytes of each text. Raises InvalidInputError, naming `field`, for what no message can carry."""
    if isinstance(texts, str):
        raise InvalidInputError(f"{field} is one string, not a list of strings. Write [{texts[:20]!r}].", field=field)
    return list(_text_sizes(texts, field))


def _text_sizes(texts: Sequence[str], field: str) -> Iterator[int]:
    for index, text in enumerate(texts):
        where = f"{field}[{index}]"
        if not isinstance(text, str):
            raise InvalidInputError(f"{where} is of the type {type(text).__name__}, not a string.", field=where)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"{where} has the half of a surrogate pair at character {error.start}, which UTF-8 cannot carry. "
                "Decode the text with errors='replace', or remove it.",
                field=where,
            ) from error
        if size > MAX_BYTES:
            raise InvalidInputError(
                f"{where} has {size} bytes, more than a message of {MAX_BYTES} can carry. Cut it into several texts.",
                field=where,
            )
        yield size


def _reference(response: Message) -> str:
    answer: Answer = response  # type: ignore[assignment]  # every inference response has these two fields
    return f"{answer.model}@{answer.model_version}"
