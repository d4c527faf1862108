"""Runs of a model that is not served yet: in the engine's turns, in batches of the self-test's own making."""

import asyncio
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import Job, RowsFailedError
from modelfleet.inference.memory_budget import SMALLER_BATCHES
from modelfleet.inference.models import LoadedModel, TextModel
from modelfleet.inference.session import RunCancellation
from modelfleet.inference.statistics import ModelRecord
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import InsufficientMemoryError, InvalidBundleError, ModelfleetError, OverloadedError

# Meanwhile the requests and probes of other models wait for the lane. A worker on which they wait for
# `canary_timeout_s`, a minute, is taken for stuck.
_LONGEST_RUN_S = 30.0
# Its first runs of a shape build an engine, which takes minutes.
_BUILDING = "TensorrtExecutionProvider"


class SlowRunError(InvalidBundleError):
    """A run of the self-test did not end in time."""


@dataclass(frozen=True, slots=True)
class Answers:
    """
    What rows were answered: each one's arrays (one of a text model, one for each output of others), or its error.

    `refused` is what the graph raised where it could not run them as one batch.
    """

    rows: list[list[Array] | ModelfleetError]
    refused: Exception | None


class SelfTestRuns:
    """A model as the engine runs it for a self-test: a request is one batch, if it may be. A context attaches it."""

    self_tested = False

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self.name = model.name
        self.record = ModelRecord()
        self.model = model
        self._engine = engine
        self._refused: Exception | None = None
        rows = model.fixed_rows if isinstance(model, TextModel) else None
        self.limits = BatchLimits(max_tokens=sys.maxsize, min_fill=0.0, max_rows=rows or sys.maxsize)
        self.on_ran: Callable[[int], None] = lambda _: None
        """Hears of each run that ended, and of its size: rows times the longest."""

    def __enter__(self) -> Self:
        self._engine.attach(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.detach(self)
        # An unloaded model is to be gone at once: who listens, and tracebacks, know it too.
        self.on_ran, self._refused = lambda _: None, None

    async def answers(self, payload: Any, lengths: Sequence[int]) -> Answers:
        """
        Run rows together, and where that fails by halves.

        Raises InsufficientMemoryError, FatalDeviceError, or InvalidBundleError for a run that takes too long.
        """
        self._refused = None
        try:
            results = await self._bounded(payload, lengths)
        except OverloadedError as error:
            raise no_memory(self.name, f"{len(lengths)} rows") from error
        except RowsFailedError as failed:
            results = [failed.errors.get(index, result) for index, result in enumerate(failed.results)]
        self.on_ran(len(lengths) * max(lengths))
        return Answers([_arrays(result) for result in results], self._refused)

    async def _bounded(self, payload: Any, lengths: Sequence[int]) -> list[Any]:
        slow_start = self.model.session.providers[0] == _BUILDING
        try:
            async with asyncio.timeout(None if slow_start else _LONGEST_RUN_S):
                return await self._engine.submit(self, payload, lengths, deadline=math.inf, probe=True)
        except TimeoutError as error:
            raise SlowRunError(
                f"The graph has not answered {len(lengths)} rows of {max(lengths)} after {_LONGEST_RUN_S:g} s on this "
                "worker. Serve it on a faster device, or make it smaller.",
                field="model",
            ) from error

    def collate(self, rows: Sequence[Row[Job]]) -> Any:
        """Do as the model does."""
        return self.model.collate(rows)

    def run(self, inputs: Any, cancellation: RunCancellation) -> Any:
        """Do as the model does, and keep what it raises."""
        try:
            return self.model.run(inputs, cancellation)
        except Exception as error:
            self._refused = self._refused or error
            raise

    def reduce(self, outputs: Any, rows: Sequence[Row[Job]]) -> Sequence[Any]:
        """Do as the model does, and keep what it raises."""
        try:
            results = self.model.reduce(outputs, rows)
        except Exception as error:
            self._refused = self._refused or error
            raise
        if len(results) != len(rows):
            self._refused = self._refused or InvalidBundleError(f"{len(rows)} rows are answered with {len(results)}.")
        return results

    def new_cancellation(self) -> RunCancellation:
        """Do as the model does."""
        return self.model.new_cancellation()


def no_memory(name: str, what: str) -> InsufficientMemoryError:
    """Return what is told of a version for which the device's memory does not do."""
    return InsufficientMemoryError(
        f"{name} does not fit: the device's memory is full at {what}. "
        f"Assign fewer versions to this worker, or have it {SMALLER_BATCHES}."
    )


def cause(error: Exception) -> str:
    """Return what ONNX Runtime said, on one line."""
    return " ".join(str(error.__cause__ or error).split())


def _arrays(result: Any) -> list[Array] | ModelfleetError:
    return result if isinstance(result, ModelfleetError | list) else [result]
