"""How much one batch may hold: it is grown to what the worker allows, unless it takes too long, or too much memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.models import LoadedModel
from modelfleet.inference.row_independence import deviation
from modelfleet.inference.self_test_runs import SelfTestRuns, SlowRunError, cause
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import InvalidBundleError, ModelfleetError, NotFiniteError
from modelfleet.runtime.memory import peak_memory, reset_peak_memory, resident_memory

# A batch that takes longer keeps others waiting and gains nothing: the device is busy with less.
_LONGEST_BATCH_S = 1.0


class BatchGrowth:
    """
    Grows the batches of one model that is being loaded, and measures the memory that they take.

    An answer in company may differ from that alone by `tolerance`.
    """

    def __init__(self, model: LoadedModel, runs: SelfTestRuns, budget: MemoryBudget, tolerance: float) -> None:
        self.tolerance = tolerance
        self._model = model
        self._runs = runs
        self._budget = budget
        self._before = budget.left()
        self._resident = resident_memory()
        self._once = (0, 0)  # bytes of the host and the device that the first run took, whatever its size
        self._first_size = self._largest_size = 0  # in padded tokens, or rows
        reset_peak_memory()
        runs.on_ran = self._ran

    async def largest(self, batch: Callable[[int], tuple[Any, Sequence[int]]], most: int) -> int:
        """
        Return how many rows, at most `most`, one batch may hold; the model is given the figures of its peak.

        `batch` makes the payload and the lengths of as many rows, the first always the same. Raises
        InsufficientMemoryError, and InvalidBundleError for a graph that fails.
        """
        model, rows = self._model, 1
        alone, _ = await self._first_row(batch(1))
        while rows < most:
            larger = min(2 * rows, most)
            payload, lengths = batch(larger)
            host_bytes, device_bytes = self._predicted(larger * max(lengths))
            self._budget.require(model.name, host_bytes, device_bytes, f"to run {larger} rows at once")
            try:
                answer, took_s = await self._first_row((payload, lengths))
                if took_s > _LONGEST_BATCH_S:  # what is done once for a size does not count
                    answer, took_s = await self._first_row((payload, lengths))
            except SlowRunError:
                break
            if took_s > _LONGEST_BATCH_S or deviation([alone], [answer]) > self.tolerance:
                break
            self._budget.require_kept(model.name, f"after {larger} rows at once")
            rows = larger
        host_bytes, device_bytes = self._grown()
        model.memory = replace(model.memory, host_peak_bytes=host_bytes, device_peak_bytes=device_bytes)
        return rows

    def _ran(self, size: int) -> None:
        if not self._first_size:
            self._first_size, self._once = size, self._grown()
        self._largest_size = max(self._largest_size, size)

    def _predicted(self, size: int) -> list[int]:
        """Return by how many bytes more the host and the device would grow; memory grows as sizes do."""
        beyond, known = max(0, size - self._largest_size), max(1, self._largest_size - self._first_size)
        return [(now - once) * beyond // known for now, once in zip(self._grown(), self._once, strict=True)]

    def _grown(self) -> tuple[int, int]:
        """Return by how many bytes the host's peak has grown, and the device's, whose arena keeps what it takes."""
        _, device_bytes = self._budget.left().since(self._before)
        return max(0, peak_memory() - self._resident), device_bytes

    async def _first_row(self, batch: tuple[Any, Sequence[int]]) -> tuple[list[Array] | ModelfleetError, float]:
        """Return what the first row is answered, and how long that took."""
        payload, lengths = batch
        began = time.monotonic()
        answers = await self._runs.answers(payload, lengths)
        took_s = time.monotonic() - began
        refused = answers.refused or answers.rows[0]
        if isinstance(refused, Exception) and not isinstance(refused, NotFiniteError):
            raise InvalidBundleError(f"The graph fails on {len(lengths)} rows: {cause(refused)}", field="model")
        return answers.rows[0], took_s
