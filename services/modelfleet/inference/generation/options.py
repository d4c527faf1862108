"""What a caller asks of a continuation, and the checks that need no engine."""

import json
import math
from dataclasses import dataclass
from enum import StrEnum

from modelfleet.runtime.errors import InvalidInputError

MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 1024
_MOST_GRAMMAR_CHARACTERS = 64 << 10
_MOST_TEMPERATURE = 100.0
_MOST_PENALTY = 100.0

_LAYOUT = "x-guidance"
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar(StrEnum):
    """What guidance is written in; the value is the engine's name of it."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Guidance:
    """A grammar that the text keeps to."""

    grammar: Grammar
    source: str

    @property
    def bounded(self) -> str:
        """
        The grammar that the engine is given: of JSON, a document on one line.

        Where blank space is free, models go on with it for ever: of eight answers at temperature 1.5 none parsed after
        120 tokens, and on one line all. A schema that says how in its own `x-guidance` is left as it is,
        https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md.
        """
        if self.grammar is not Grammar.JSON_SCHEMA:
            return self.source
        try:
            schema = json.loads(self.source)
        except (ValueError, RecursionError):
            return self.source  # the engine says what is wrong with it
        if not isinstance(schema, dict) or _LAYOUT in schema:
            return self.source
        return json.dumps({**schema, _LAYOUT: _ONE_LINE})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; None is as the model's `genai_config.json` says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None

    @property
    def random(self) -> bool | None:
        """Whether tokens are drawn rather than the likeliest taken; None where nothing was asked for."""
        if self.temperature == 0 or self.top_k == 1:
            return False
        asked = (self.temperature, self.top_k, self.top_p, self.seed)
        return True if any(value is not None for value in asked) else None


@dataclass(frozen=True, slots=True)
class Options:
    """`max_tokens` 0 leaves it to the worker."""

    max_tokens: int = 0
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    n: int = 1
    guidance: Guidance | None = None
    logprobs: bool = False

    def check(self, *, vocabulary_size: int | None, max_streams: int) -> None:
        """Raise InvalidInputError for what no model, or not this one, can do."""
        if self.max_tokens < 0:
            raise InvalidInputError(
                f"max_tokens is {self.max_tokens}. Give a positive number, or 0 for the worker's default.",
                field="max_tokens",
            )
        if not 1 <= self.n <= max_streams:
            raise InvalidInputError(
                f"n is {self.n}; this model generates at most {max_streams} continuations at once. Give 1 to "
                f"{max_streams}.",
                field="n",
            )
        self._check_sampling(vocabulary_size or 2**31 - 1)
        self._check_stop()
        self._check_guidance()

    def _check_sampling(self, vocabulary_size: int) -> None:
        sampling = self.sampling
        _check_range("temperature", sampling.temperature, 0, _MOST_TEMPERATURE)
        _check_range("top_k", sampling.top_k, 0, vocabulary_size)
        _check_range("top_p", sampling.top_p, 0, 1, above=True)
        _check_range("repetition_penalty", sampling.repetition_penalty, 0, _MOST_PENALTY, above=True)

    def _check_stop(self) -> None:
        if len(self.stop) > MOST_STOPS:
            raise InvalidInputError(f"stop has {len(self.stop)} strings. Give at most {MOST_STOPS}.", field="stop")
        for index, one in enumerate(self.stop):
            if not 0 < len(one) <= _MOST_STOP_CHARACTERS:
                raise InvalidInputError(
                    f"stop[{index}] has {len(one)} characters. Give 1 to {_MOST_STOP_CHARACTERS}.", field="stop"
                )

    def _check_guidance(self) -> None:
        if self.guidance is None:
            return
        source = self.guidance.source
        if not 0 < len(source) <= _MOST_GRAMMAR_CHARACTERS:
            raise InvalidInputError(
                f"The grammar has {len(source)} characters. Give 1 to {_MOST_GRAMMAR_CHARACTERS}.", field="guidance"
            )
        if "\0" in source:  # where the library would take it to end
            raise InvalidInputError("The grammar has a NUL character. Write it as an escape.", field="guidance")


def _check_range(name: str, value: float | None, least: float, most: float, *, above: bool = False) -> None:
    if value is None:
        return
    # Written so that NaN fails too.
    if not (math.isfinite(value) and (value > least if above else value >= least) and value <= most):
        bounds = f"above {least:g}" if above else f"from {least:g}"
        raise InvalidInputError(f"{name} is {value:g}. Give a number {bounds} to {most:g}.", field=f"sampling.{name}")
