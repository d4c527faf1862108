"""The smallest request of a model, asked again at intervals, and what was answered when the model was proved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelfleet.bundle.golden import difference
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import RowsFailedError, Runnable
from modelfleet.inference.tensor_spec import Array


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A request of the worker's own: its payload and the lengths of its rows."""

    payload: Any
    lengths: list[int]

    def __str__(self) -> str:
        length = max(self.lengths)
        return f"{len(self.lengths)} rows" + (f" of {length} tokens" if length > 1 else "")

    async def run(self, model: Runnable, engine: Engine) -> list[Array]:
        """Return the arrays that a model answers. Raises what `results` raises."""
        return _flat(await self.results(model, engine))

    async def results(self, model: Runnable, engine: Engine) -> list[Any]:
        """
        Return the results of the rows. Raises what `Engine.submit` raises, and the error of a row that has none.

        It passes the model's own queue, whatever waits there, and shares its batch with none: the others' padding and
        quantization scales would change the answer.
        """
        try:
            return await engine.submit(model, self.payload, self.lengths, deadline=math.inf, key=self, probe=True)
        except RowsFailedError as failed:
            raise failed.first from failed.first.__cause__


class Question(Protocol):
    """What is asked of a model of whatever kind."""

    async def run(self, model: Any, engine: Engine) -> list[Array]:
        """Return the arrays that a model answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """A trial and what was answered first. `tolerance` is a share of the answer's largest magnitude."""

    trial: Question
    expected: list[Array]
    tolerance: float

    def difference(self, answer: Sequence[Array]) -> float:
        """Return by how much an answer differs, as a share of the largest magnitude."""
        return max(difference(wanted, got) for wanted, got in zip(self.expected, answer, strict=True))


def _flat(results: Sequence[Any]) -> list[Array]:
    """Return the arrays of rows that have one each (text models) or several (tensor models)."""
    return [array for row in results for array in (row if isinstance(row, list) else [row])]
