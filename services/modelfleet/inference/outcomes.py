"""How requests end, with results, an error or nobody left to hear of it; what is recorded and who is told."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from modelfleet.inference import metrics
from modelfleet.inference.jobs import Batch, Job, Place, RowsFailedError, Runnable
from modelfleet.inference.session import RefusedInputs
from modelfleet.runtime.deadlines import ran_out
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    DrainingError,
    FatalDeviceError,
    InvalidInputError,
    ModelfleetError,
    SessionFailureError,
)
from modelfleet.runtime.tracing import record_stage

_CALLERS_FAULTS = (InvalidInputError, DeadlineExpiredError)


class Outcomes:
    """
    Ends the requests of one engine, in any of its threads, and wakes their callers in its event loop.

    `work` is the engine's lock. `fatal` hears, in the event loop, of a device that has failed for good.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: threading.Condition) -> None:
        self._loop = loop
        self._work = work
        self.fatal: Callable[[FatalDeviceError], None] = lambda _: None

    def finish(self, batch: Batch, timed_outputs: tuple[Any, float, float]) -> None:
        """
        Hand each row its result, or the error in its place, and wake the callers whose last row this was.

        Raises what `reduce` raises; then no row has ended.
        """
        model, started = batch.place.model, time.monotonic()
        outputs, collate_s, run_s = timed_outputs
        results = model.reduce(outputs, batch.rows)
        if len(results) != len(batch.rows):
            raise SessionFailureError(f"{model.name} answered {len(batch.rows)} rows with {len(results)}.")
        ended = time.monotonic()
        metrics.STAGE_SECONDS.labels("postprocess").observe(ended - started)
        if not all(job.probe for job in batch.jobs):
            model.record.batch(len(batch.rows), collate_s=collate_s, run_s=run_s, reduce_s=ended - started)
        for job in batch.jobs:
            job.reduce_s += ended - started
        self._settle(batch, results)

    def fail(self, batch: Batch, error: ModelfleetError) -> None:
        """Let the one row of a batch have no result."""
        (_,) = batch.rows
        self._settle(batch, [error])

    def _settle(self, batch: Batch, results: Sequence[Any]) -> None:
        now, model = time.monotonic(), batch.place.model
        whole = []
        with self._work:  # rows of one request may end in several threads at once
            for row, result in zip(batch.rows, results, strict=True):
                job = row.request
                if isinstance(result, ModelfleetError):
                    job.errors[row.index] = result
                else:
                    job.results[row.index] = result
                job.missing -= 1
                if not job.missing:
                    whole.append(job)
        for job in whole:
            if job.probe:
                continue
            if job.errors:
                metrics.count_failed_rows(model.name, job.errors.values())
                fault = not all(_callers_fault(error, model) for error in job.errors.values())
                model.record.failure(now - job.arrival, fault=fault)
                continue
            model.record.request(
                len(job.lengths),
                total_s=now - job.arrival,
                queue_s=job.queue_s or 0.0,
                collate_s=job.collate_s,
                run_s=job.run_s,
                reduce_s=job.reduce_s,
            )
        if whole:
            self._loop.call_soon_threadsafe(_resolve, whole)

    def reject(self, jobs: Sequence[Job], place: Place, error: ModelfleetError) -> None:
        """End requests with an error."""
        now = time.monotonic()
        with self._work:
            for job in jobs:
                place.queue.discard(job)
                # Else nobody waits for it any more, or another batch of its rows has failed already.
                if job.missing > 0 and not job.probe:
                    place.model.record.failure(now - job.arrival, fault=not _callers_fault(error, place.model))
                job.missing = 0  # so that no batch of it that still runs makes it whole
        self._loop.call_soon_threadsafe(_raise, jobs, error)
        if isinstance(error, FatalDeviceError):
            self._loop.call_soon_threadsafe(self.fatal, error)

    def leave(self, job: Job, place: Place) -> None:
        """End a request whose caller has left, within the lock."""
        now = time.monotonic()
        elapsed_s = now - job.arrival
        if job.missing > 0 and ran_out(elapsed_s, job.deadline - now):
            # While rows of it still wait for their turn, it is the load that takes long.
            place.model.record.failure(elapsed_s, fault=not job.waiting)
        job.missing = 0  # as in reject
        place.queue.discard(job)


def _callers_fault(error: ModelfleetError, model: Runnable) -> bool:
    """
    Return whether an error says nothing against the version.

    What a graph refuses that has never answered an input such as callers send is counted: it may be the graph that is
    wrong.
    """
    return isinstance(error, _CALLERS_FAULTS) and (model.self_tested or not isinstance(error.__cause__, RefusedInputs))


def _resolve(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.future.done():
            continue
        if job.errors:
            job.future.set_exception(RowsFailedError(job.errors, job.results))
        else:
            job.future.set_result(job.results)


def _raise(jobs: Sequence[Job], error: ModelfleetError) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


def trace(job: Job) -> None:
    """Tell the caller's trace of the stages of a request that was answered."""
    began = job.arrival + (job.queue_s or 0.0)
    record_stage("queue", job.arrival, began)
    record_stage("run", began, time.monotonic(), rows=len(job.lengths), tokens=sum(job.lengths), session_s=job.run_s)


def expired(job: Job, now: float) -> DeadlineExpiredError:
    """Return what a request is told whose deadline passed before it ran."""
    return DeadlineExpiredError(
        f"The deadline passed after {now - job.arrival:.3f} s in the queue; the request was dropped before it ran. "
        "Allow more time, or add workers."
    )


def draining() -> DrainingError:
    """Return what a request is told that an engine which stops will not run."""
    return DrainingError("The worker is shutting down. Retry on another replica.")


def failure(model: Runnable, error: Exception) -> ModelfleetError:
    """Return what a request is told on which a model raised an error."""
    if isinstance(error, ModelfleetError):
        return error
    unforeseen = SessionFailureError(f"{model.name} failed on this input. The server's log has the cause.")
    unforeseen.__cause__ = error
    return unforeseen
