"""Which rows go into a request together: as many as their tokens, by estimate, allow."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from modelfleet_tools.batch.tasks import Inputs

# What a client sends in one message.
MAX_ROWS = 256
MAX_CHARACTERS = 4 << 20
# English text in word pieces, until the service has said how many tokens texts really have.
_FIRST_TOKENS_PER_CHARACTER = 0.25
_FIRST_TRUST = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """A row to ask about. `kept` are the values to copy to the output."""

    number: int
    place: str
    inputs: Inputs
    kept: dict[str, object]


@dataclass(frozen=True, slots=True)
class Failed:
    """A row that there is no result for, and why."""

    number: int
    place: str
    reason: str
    message: str


Portion: TypeAlias = tuple[Row | Failed, ...]
"""Rows of one request, in order, with those between them that failed before they could be sent."""


class TokenEstimate:
    """Tokens a character, learnt from what the service reports."""

    def __init__(self) -> None:
        self._characters = _FIRST_TRUST
        self._tokens = _FIRST_TRUST * _FIRST_TOKENS_PER_CHARACTER

    def learn(self, characters: int, tokens: int) -> None:
        """Take a report into account; the last few thousand characters weigh half."""
        decay = _FIRST_TRUST / (_FIRST_TRUST + characters)
        self._characters = int(self._characters * decay) + characters
        self._tokens = self._tokens * decay + tokens

    def of(self, inputs: Inputs) -> float:
        """Return how many tokens inputs probably have: at least 3 a text, as most models add two."""
        return inputs.characters * self._tokens / max(self._characters, 1) + 3 * len(inputs.texts)


async def fill(
    blocks: AsyncIterator[Sequence[Row | Failed]], estimate: TokenEstimate, tokens: int, rows: int = MAX_ROWS
) -> AsyncIterator[Portion]:
    """Yield portions of at most `rows` rows and about `tokens` tokens; a row that has more goes alone."""
    portion: list[Row | Failed] = []
    filled, characters, count = 0.0, 0, 0
    async for block in blocks:
        for row in block:
            if isinstance(row, Row):
                expected = estimate.of(row.inputs)
                if count and (
                    count == rows or filled + expected > tokens or characters + row.inputs.characters > MAX_CHARACTERS
                ):
                    yield tuple(portion)
                    portion, filled, characters, count = [], 0.0, 0, 0
                filled, characters, count = filled + expected, characters + row.inputs.characters, count + 1
            portion.append(row)
            if len(portion) >= 2 * MAX_ROWS:  # failed ones alone fill no request
                yield tuple(portion)
                portion, filled, characters, count = [], 0.0, 0, 0
    if portion:
        yield tuple(portion)
