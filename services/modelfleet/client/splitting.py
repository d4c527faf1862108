"""Batches larger than a message, sent as several calls that one model version answers."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from modelfleet.client.channel import DEFAULT_MAX_MESSAGE_BYTES
from modelfleet.client.steps import Deadline, Method, Procedure, ask, pause, run_all, tries_when_full
from modelfleet.runtime.errors import (
    InvalidInputError,
    ModelfleetError,
    ModelLoadingError,
    ModelVersionNotFoundError,
    NotServedHereError,
    OverloadedError,
)

# Enough for full batches, and little enough that several parts fit a worker's queue, that each part's answer fits a
# message of gRPC's default size, and that each part has a deadline of its own.
MAX_ITEMS = 256
MAX_BYTES = 64 << 10
# Room for the rest of the message. Servers may take less, and say so.
MAX_TEXT_BYTES = DEFAULT_MAX_MESSAGE_BYTES // 2

_STARTS = 3
_TRIES = 10
# As servers name what is at fault, by its index in their request.
_ELEMENT = re.compile(r"\b(texts|documents|pairs|token_ids)\[(\d+)\]")
_LONGEST_PAUSE_S = 2.0


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
    *,
    affinity_key: str = "",
) -> Procedure[list[AnswerMessage]]:
    """
    Send items of the given `sizes` (bytes) in as few calls as they fit; return the responses in order.

    `request` makes the message for a model reference and a slice of the items. The version that answers the first part
    is named for all others, so that an alias which moves meanwhile does not mix two versions in one answer. Where that
    version is unloaded before the last part, all parts are sent anew. `timeout_s` is for all of it; None gives each
    request the client's.
    """
    deadline = Deadline(timeout_s)
    first, *rest = parts(sizes)
    if not rest:
        tries = yield from tries_when_full()
        return [(yield from _ask_patiently(method, request(model, first), deadline, affinity_key, tries=tries))]
    for starts_left in reversed(range(_STARTS)):
        response = yield from _ask_patiently(method, request(model, first), deadline, affinity_key)
        pinned = _reference(response)
        try:
            others = yield from run_all(
                _ask_part(method, request(pinned, part), deadline, affinity_key, part.start) for part in rest
            )
        except (NotServedHereError, ModelVersionNotFoundError, ModelLoadingError):
            if not starts_left or pinned == model:
                raise
        else:
            return [response, *others]
    raise AssertionError("the last start returns or raises")


def _ask_part(
    method: Method[AnswerMessage], request: Message, deadline: Deadline, affinity_key: str, start: int
) -> Procedure[AnswerMessage]:
    """Ask for the items from `start` on; an error names items as the caller counts them."""
    try:
        return (yield from _ask_patiently(method, request, deadline, affinity_key))
    except ModelfleetError as error:
        error.message = _ELEMENT.sub(lambda element: _moved(element, start), error.message)
        error.args = (error.message,)
        error.fields = tuple(_ELEMENT.sub(lambda element: _moved(element, start), field) for field in error.fields)
        raise


def _moved(element: re.Match[str], start: int) -> str:
    return f"{element[1]}[{int(element[2]) + start}]"


def _ask_patiently(
    method: Method[AnswerMessage],
    request: Message,
    deadline: Deadline,
    affinity_key: str = "",
    *,
    tries: int = _TRIES,
) -> Procedure[AnswerMessage]:
    """Ask again when a queue is full, later and later: a batch that is half done is worth more waits."""
    for tried in range(tries - 1):
        try:
            return (yield from ask(method, request, deadline.left(), affinity_key=affinity_key))
        except OverloadedError as error:
            seconds = min((error.retry_after_s or 1) * 2**tried, _LONGEST_PAUSE_S)
            if not deadline.allows(seconds):
                raise
            yield from pause(seconds)
    return (yield from ask(method, request, deadline.left(), affinity_key=affinity_key))


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


def text_list(texts: Iterable[str], field: str) -> list[str]:
    """Return the texts of any iterable. Raises InvalidInputError, naming `field`, for what is none or has no order."""
    if isinstance(texts, str):
        raise InvalidInputError(f"{field} is one string, not a list of strings. Write [{texts[:20]!r}].", field=field)
    if isinstance(texts, bytes | AbstractSet | Mapping) or not isinstance(texts, Iterable):
        raise InvalidInputError(
            f"{field} is of the type {type(texts).__name__}, not a list of strings. Answers come in the order "
            "of a list.",
            field=field,
        )
    return list(texts)


def text_sizes(texts: Sequence[str], field: str) -> list[int]:
    """Return the bytes of each text. Raises InvalidInputError, naming `field`, for what no message can carry."""
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
        if size > MAX_TEXT_BYTES:
            raise InvalidInputError(
                f"{where} has {size} bytes, more than the {MAX_TEXT_BYTES} that a message can carry. "
                "Cut it into several texts.",
                field=where,
            )
        yield size


def _reference(response: Message) -> str:
    answer: Answer = response  # type: ignore[assignment]  # every inference response has these two fields
    return f"{answer.model}@{answer.model_version}"
