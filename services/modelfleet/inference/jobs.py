"""What the engine works on: requests with their callers, the models that run them, and batches of their rows."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modelfleet.inference import metrics
from modelfleet.inference.batching import BatchLimits, BatchQueue, Request, Row
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import ModelfleetError


class RowsFailedError(Exception):
    """Rows of a request that cannot be answered, by index, and why; `results` has those of the others."""

    def __init__(self, errors: Mapping[int, ModelfleetError], results: Sequence[Any]) -> None:
        self.errors = dict(sorted(errors.items()))
        self.results = results
        super().__init__(f"rows {', '.join(map(str, self.errors))}: {self.first}")

    @property
    def first(self) -> ModelfleetError:
        """Why the first of them failed."""
        return next(iter(self.errors.values()))


@dataclass(eq=False, slots=True)
class Job(Request):
    """A request on its way through the engine: its input, its results so far, and who waits for them."""

    payload: Any
    future: asyncio.Future[list[Any]]
    results: list[Any]
    missing: int
    probe: bool = False
    errors: dict[int, ModelfleetError] = field(default_factory=dict)
    queue_s: float | None = None
    collate_s: float = 0.0
    run_s: float = 0.0
    reduce_s: float = 0.0


class Cancellation(Protocol):
    """Stops one run."""

    def cancel(self) -> None:
        """Stop the run soon. May be called at any time, from any thread, also before or after the run."""


class Runnable(Protocol):
    """What the engine runs: a loaded model. Inputs and outputs are its own; results go to the callers."""

    name: str
    record: ModelRecord
    self_tested: bool
    """It has answered inputs such as callers send, so that what it refuses is the caller's doing."""

    @property
    def limits(self) -> BatchLimits:
        """What one batch may hold, from when it is attached on."""

    def collate(self, rows: Sequence[Row[Job]]) -> Any:
        """Return the inputs of a batch."""

    def run(self, inputs: Any, cancellation: Any) -> Any:
        """Return the outputs of a batch. Releases the interpreter lock for most of its time."""

    def reduce(self, outputs: Any, rows: Sequence[Row[Job]]) -> Sequence[Any]:
        """Return one result for each row, in order; for a row that has none, the ModelfleetError that says why."""

    def new_cancellation(self) -> Cancellation:
        """Return what can stop one run."""


@dataclass(eq=False, slots=True)
class Place:
    """One model's place at the engine."""

    model: Runnable
    queue: BatchQueue[Job]
    series: metrics.ModelSeries
    last_turn: float = 0.0


@dataclass(eq=False, slots=True)
class Batch:
    """Rows that run together."""

    place: Place
    rows: Sequence[Row[Job]]
    cancellation: Cancellation
    started: float

    @property
    def jobs(self) -> list[Job]:
        """The requests that the rows are of."""
        return list(dict.fromkeys(row.request for row in self.rows))
