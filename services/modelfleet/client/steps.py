"""
What a client does, apart from how it waits.

A procedure is a generator that yields steps and is sent their outcomes, so that `Client` and `AsyncClient` share every
line but those that wait. Inside one, `yield from ask(...)` reads like a call.
"""

import functools
import inspect
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from modelfleet.runtime.affinity import AFFINITY_HEADER
from modelfleet.runtime.errors import DeadlineExpiredError, InvalidInputError

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_TRIES_WHEN_FULL = 4
AT_ONCE = 4
"""Procedures that `All` has under way."""

M = TypeVar("M", bound=Message)
R = TypeVar("R")


class Service(StrEnum):
    """A service that a client talks to."""

    INFERENCE = "inference"
    TOKENIZER = "tokenizer"
    MANAGER = "manager"


@dataclass(frozen=True, slots=True)
class Method(Generic[M]):
    """An RPC: the service that has it, its path, the message that it returns."""

    service: Service
    path: str
    response: type[M]


@dataclass(frozen=True, slots=True)
class Ask:
    """Call a method with one message. Without `timeout_s`, the client's default holds; `affinity_key` may be empty."""

    method: Method[Any]
    request: Message
    timeout_s: float | None = None
    wait_for_ready: bool = False
    affinity_key: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What travels beside the message. Raises InvalidInputError for a key that cannot."""
        if not self.affinity_key:
            return ()
        if not (self.affinity_key.isascii() and self.affinity_key.isprintable()):
            raise InvalidInputError(
                f"affinity_key is {self.affinity_key!r}. Use printable ASCII, such as a hash of it.",
                field="affinity_key",
            )
        return ((AFFINITY_HEADER, self.affinity_key),)


@dataclass(frozen=True, slots=True)
class All:
    """Run several procedures, a few at a time; their results come in order. The first failure ends them all."""

    procedures: tuple["Procedure[Any]", ...]


class Messages(Iterator[Message]):
    """Messages to stream. An error in making them ends the stream; `check` raises it where it can be caught."""

    def __init__(self, source: Iterator[Message]) -> None:
        self._source = source
        self._error: Exception | None = None

    def __next__(self) -> Message:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as error:  # noqa: BLE001  raised again by `check`; gRPC would only log it
            self._error = error
            raise StopIteration from None

    def check(self) -> None:
        """Raise the error that ended the stream, if one did."""
        if self._error:
            raise self._error


@dataclass(frozen=True, slots=True)
class Upload:
    """Call a method with a stream of messages, whose making may read files."""

    method: Method[Any]
    messages: Messages
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass before the next try."""

    seconds: float


def bounded(timeout_s: float) -> float | None:
    """
    Return the seconds that gRPC may take; None for no end.

    Raises DeadlineExpiredError where none are left, as what is left of a caller's own time may be, and
    InvalidInputError for what is no number.
    """
    if math.isnan(timeout_s):
        raise InvalidInputError("timeout_s is NaN. Give seconds, or None for the client's default.", field="timeout_s")
    if timeout_s <= 0:
        raise DeadlineExpiredError(
            f"The time was up before the call: timeout_s is {timeout_s:g}. Nothing was sent. Allow it more."
        )
    return None if math.isinf(timeout_s) else timeout_s


@dataclass(frozen=True, slots=True)
class TriesWhenFull:
    """Tell how often the client sends a request that full queues refuse."""


class Deadline:
    """
    When a call with a `timeout_s` of its own ends, whatever number of requests it makes.

    Without one, each request has the client's: a batch may be of any size.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + (bounded(timeout_s) or math.inf)

    def left(self) -> float | None:
        """Return the seconds that the next request may take. Raises DeadlineExpiredError when none are left."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExpiredError(
                f"The call did not end within its {self._timeout_s:g} s. Allow it more, or send less at once."
            )
        return left

    def allows(self, seconds: float) -> bool:
        """Whether a request could still be made after a pause."""
        return self._end is None or time.monotonic() + seconds < self._end


Step: TypeAlias = Ask | All | Upload | Pause | TriesWhenFull
Procedure: TypeAlias = Generator[Step, Any, R]


def ask(
    method: Method[M],
    request: Message,
    timeout_s: float | None,
    *,
    wait_for_ready: bool = False,
    affinity_key: str = "",
) -> Procedure[M]:
    """Return the response to one request."""
    response: M = yield Ask(method, request, timeout_s, wait_for_ready, affinity_key)
    return response


def run_all(procedures: Iterable[Procedure[R]]) -> Procedure[list[R]]:
    """Return the results of several procedures, in order."""
    results: list[R] = yield All(tuple(procedures))
    return results


def upload(method: Method[M], messages: Iterator[Message], timeout_s: float) -> Procedure[M]:
    """Return the response to a stream of messages."""
    response: M = yield Upload(method, Messages(messages), timeout_s)
    return response


def pause(seconds: float) -> Procedure[None]:
    """Let time pass."""
    yield Pause(seconds)


def tries_when_full() -> Procedure[int]:
    """Return how often the client sends a request that full queues refuse."""
    tries: int = yield TriesWhenFull()
    return tries


def present(method: Callable[..., object], procedure: Callable[..., object]) -> None:
    """Give a client's method the name, the description and the parameters of its procedure, for `help` and editors."""
    functools.update_wrapper(method, procedure)
    signature = inspect.signature(procedure)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # What `inspect.signature` looks at before anything else.
    vars(method)["__signature__"] = signature.replace(
        parameters=[itself, *signature.parameters.values()], return_annotation=inspect.Signature.empty
    )
