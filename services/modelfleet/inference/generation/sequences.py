"""One continuation on its way through the engine, and what comes back of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from modelfleet.inference.generation.options import Options
from modelfleet.runtime.errors import ModelfleetError


class Finish(StrEnum):
    """Why a continuation ended."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    STOP_STRING = "STOP_STRING"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt, those of them whose computation was still there, and tokens generated."""

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step brought a continuation: tokens with their log-probabilities when asked for, or its end."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: Finish | None = None
    cached_prompt_tokens: int = 0
    error: ModelfleetError | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """
    A prompt (int32 [tokens]) to continue by at most `max_tokens`.

    `seed` is this continuation's own. `deadline` and `arrival` are in seconds on the monotonic clock. `emit` is called
    in the event loop with each progress; the last has a `finish` or an `error`. A `probe` is the worker's own and not
    counted.
    """

    prompt: NDArray[np.int32]
    max_tokens: int
    options: Options
    seed: int | None
    client: str
    arrival: float
    deadline: float
    emit: Callable[[Progress], None]
    probe: bool = False
    first_token: float = 0.0
    last_token: float = 0.0
    generated: int = field(default=0)

    @property
    def cost(self) -> int:
        """Most tokens that the cache will hold of it."""
        return len(self.prompt) + self.max_tokens
