"""
The threads that run sessions.

A device has lanes: as many batches as may run on it at once (one on a CPU; two on a GPU, so that copies overlap
compute). All models on the device share them and take turns. There is one thread more than there are lanes: while
the lanes run, the spare thread reduces the batch that has just ended. A batch is formed only when a lane is free for
it, since whatever arrives until then can still join.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelfleet.inference import metrics
from modelfleet.inference.batching import BatchLimits, BatchQueue, Request, Row
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.deadlines import ran_out
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    DrainingError,
    FatalDeviceError,
    InvalidInputError,
    ModelfleetError,
    ModelLoadingError,
    OverloadedError,
    SessionFailureError,
)
from modelfleet.runtime.tracing import record_stage

_CALLERS_FAULTS = (InvalidInputError, DeadlineExpiredError)


@dataclass(eq=False, slots=True)
class Job(Request):
    """A request on its way through the engine: its input, its results so far, and who waits for them."""

    payload: Any
    future: asyncio.Future[list[Any]]
    results: list[Any]
    missing: int
    probe: bool = False
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
    limits: BatchLimits
    record: ModelRecord

    def collate(self, rows: Sequence[Row[Job]]) -> Any:
        """Return the inputs of a batch."""

    def run(self, inputs: Any, cancellation: Any) -> Any:
        """Return the outputs of a batch. Releases the interpreter lock for most of its time."""

    def reduce(self, outputs: Any, rows: Sequence[Row[Job]]) -> Sequence[Any]:
        """Return one result for each row, in order."""

    def new_cancellation(self) -> Cancellation:
        """Return what can stop one run."""


@dataclass(eq=False, slots=True)
class _Place:
    """One model's place at the engine."""

    model: Runnable
    queue: BatchQueue[Job]
    series: metrics.ModelSeries
    last_turn: float = 0.0


@dataclass(eq=False, slots=True)
class _Batch:
    """Rows that run together."""

    place: _Place
    rows: Sequence[Row[Job]]
    cancellation: Cancellation
    started: float

    @property
    def jobs(self) -> list[Job]:
        return list(dict.fromkeys(row.request for row in self.rows))


class Engine:
    """
    Runs requests in batches, for the event loop in which it was made.

    `max_queue_tokens` bounds the tokens that wait for one model; a request that finds its queue empty is taken
    whatever its size.
    """

    def __init__(self, lanes: int, max_queue_tokens: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_queue_tokens = max_queue_tokens
        self._free_lanes = lanes
        self._places: dict[Runnable, _Place] = {}
        self._running: set[_Batch] = set()
        self._stopping = False
        self._fatal: Callable[[FatalDeviceError], None] = lambda _: None
        self.batches_ended = 0
        """Grows while anything is run: a sign of life."""
        self._work = threading.Condition()
        self._threads = [threading.Thread(target=self._serve, name=f"engine-{n}") for n in range(lanes + 1)]
        for thread in self._threads:
            thread.start()

    def attach(self, model: Runnable) -> None:
        """Give a model a queue."""
        queue: BatchQueue[Job] = BatchQueue(model.limits)
        with self._work:
            self._places[model] = _Place(model, queue, metrics.ModelSeries(model.name, lambda: queue.rows))

    def detach(self, model: Runnable) -> None:
        """Take a model's queue away. What still waits in it never runs: drain first."""
        with self._work:
            del self._places[model]

    def on_fatal_error(self, listener: Callable[[FatalDeviceError], None]) -> None:
        """Have `listener` called, in the event loop, when the device has failed for good."""
        self._fatal = listener

    def device_failed(self, error: FatalDeviceError) -> None:
        """Tell that listener of a failure under what this engine does not run: generation has threads of its own."""
        self._fatal(error)

    def longest_run_s(self) -> float:
        """
        Return for how long the oldest batch of callers that runs now has been running, in seconds; 0 when none runs.

        The worker's own do not count: what a model does in its first runs may take minutes.
        """
        with self._work:
            callers = (batch for batch in self._running if not all(row.request.probe for row in batch.rows))
            started = min((batch.started for batch in callers), default=None)
        return 0.0 if started is None else time.monotonic() - started

    def close(self) -> None:
        """Stop the threads once the batches that run have ended; requests that wait get DrainingError."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        for place in self._places.values():
            self._reject(place.queue.requests(), place, _draining())

    async def submit(
        self,
        model: Runnable,
        payload: Any,
        lengths: Sequence[int],
        *,
        deadline: float,
        key: Hashable = None,
        probe: bool = False,
    ) -> list[Any]:
        """
        Run all rows of a request and return their results in order.

        `lengths` are the tokens of each row; `deadline` is in seconds on the monotonic clock; rows of requests with
        equal `key` may share a batch. A `probe` is the worker's own request: a full queue takes it, and the model's
        record does not count it. Cancelling the awaiting task drops the rows that wait, and stops a batch of which
        nobody is left; the record counts it as failed where its deadline has come. Raises OverloadedError,
        DeadlineExpiredError, DrainingError, SessionFailureError, or the ModelfleetError that the model raised.
        """
        job = Job(
            lengths=lengths,
            arrival=time.monotonic(),
            deadline=deadline,
            key=key,
            payload=payload,
            future=self._loop.create_future(),
            results=[None] * len(lengths),
            missing=len(lengths),
            probe=probe,
        )
        with self._work:
            place = self._admit(model, job)
        try:
            results = await job.future
        except asyncio.CancelledError:
            with self._work:
                self._abandon(place, job)
            raise
        _trace(job)
        return results

    def _admit(self, model: Runnable, job: Job) -> _Place:
        if self._stopping:
            raise _draining()
        place = self._places.get(model)
        if place is None:
            raise ModelLoadingError(f"{model.name} is being unloaded. Retry.")
        tokens = sum(job.lengths)
        if not job.probe and place.queue.tokens and place.queue.tokens + tokens > self._max_queue_tokens:
            raise OverloadedError(
                f"The queue of {model.name} holds {place.queue.tokens} tokens and takes at most "
                f"{self._max_queue_tokens}; this request has {tokens}. Retry later or on another replica."
            )
        place.queue.put(job)
        if self._free_lanes:
            self._work.notify()
        return place

    def _abandon(self, place: _Place, job: Job) -> None:
        now = time.monotonic()
        elapsed_s = now - job.arrival
        if job.missing > 0 and ran_out(elapsed_s, job.deadline - now):
            # While rows of it still wait for their turn, it is the load that takes long.
            place.model.record.failure(elapsed_s, fault=not job.waiting)
        job.missing = 0
        place.queue.discard(job)
        for batch in self._running:
            if all(row.request.future.done() for row in batch.rows):
                batch.cancellation.cancel()

    # From here on: the engine's threads.

    def _serve(self) -> None:
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """Wait for a batch and run it. Returns whether there was one. A thread that waits holds nothing of the last."""
        batch = self._next()
        if batch is None:
            return False
        try:
            outputs = self._run(batch)
        except Exception as error:  # noqa: BLE001  whatever a session raises goes to the callers; the thread lives on
            self._isolate(batch, error)
            return True
        finally:
            self._free(batch)
        self._finish(batch, outputs)
        return True

    def _next(self) -> _Batch | None:
        """Wait for a free lane and for rows, and take both. None when the engine stops."""
        with self._work:
            while not self._stopping:
                if self._free_lanes and (batch := self._form()):
                    self._free_lanes -= 1
                    self._running.add(batch)
                    if self._free_lanes:  # one call of `submit` may have brought work for several lanes
                        self._work.notify()
                    return batch
                self._work.wait()
            return None

    def _form(self) -> _Batch | None:
        now = time.monotonic()
        for place in sorted(self._places.values(), key=lambda place: place.last_turn):
            for job in place.queue.take_expired(now):
                self._reject([job], place, _expired(job, now))
            if rows := place.queue.take_batch(now):
                place.last_turn = now
                return _Batch(place, rows, place.model.new_cancellation(), now)
        return None

    def _free(self, batch: _Batch) -> None:
        with self._work:
            self._running.discard(batch)
            self.batches_ended += 1
            self._free_lanes += 1
            self._work.notify()

    def _run(self, batch: _Batch) -> Any:
        model, started = batch.place.model, time.monotonic()
        for job in batch.jobs:
            if job.queue_s is None:
                job.queue_s = started - job.arrival
                metrics.STAGE_SECONDS.labels("queue").observe(job.queue_s)
        inputs = model.collate(batch.rows)
        collated = time.monotonic()
        outputs = model.run(inputs, batch.cancellation)
        ended = time.monotonic()
        batch.place.series.observe_batch([row.length for row in batch.rows], ended - collated)
        for job in batch.jobs:
            job.collate_s += collated - started
            job.run_s += ended - collated
        return outputs, collated - started, ended - collated

    def _isolate(self, batch: _Batch, error: Exception) -> None:
        """Run each request of a failed batch alone, so that only the one at fault fails."""
        if len(batch.jobs) == 1 or isinstance(error, FatalDeviceError):
            self._reject(batch.jobs, batch.place, _failure(batch.place.model, error))
            return
        for job in batch.jobs:
            rows = [row for row in batch.rows if row.request is job]
            alone = _Batch(batch.place, rows, batch.place.model.new_cancellation(), time.monotonic())
            with self._work:
                if job.future.done():
                    continue  # nobody waits for it any more
                self._running.add(alone)
            try:
                outputs = self._run(alone)
            except Exception as own_error:  # noqa: BLE001  as in _serve
                self._reject([job], batch.place, _failure(batch.place.model, own_error))
            else:
                self._finish(alone, outputs)
            finally:
                with self._work:
                    self._running.discard(alone)
                    self.batches_ended += 1

    def _finish(self, batch: _Batch, timed_outputs: tuple[Any, float, float]) -> None:
        """Hand each row its result, and wake the callers whose last row this was."""
        model, started = batch.place.model, time.monotonic()
        outputs, collate_s, run_s = timed_outputs
        try:
            results = list(zip(batch.rows, model.reduce(outputs, batch.rows), strict=True))
        except Exception as error:  # noqa: BLE001  as in _serve
            self._reject(batch.jobs, batch.place, _failure(model, error))
            return
        ended = time.monotonic()
        metrics.STAGE_SECONDS.labels("postprocess").observe(ended - started)
        if not all(job.probe for job in batch.jobs):
            model.record.batch(len(batch.rows), collate_s=collate_s, run_s=run_s, reduce_s=ended - started)
        whole = []
        with self._work:  # rows of one request may end in several threads at once
            for job in batch.jobs:
                job.reduce_s += ended - started
            for row, result in results:
                job = row.request
                job.results[row.index] = result
                job.missing -= 1
                if not job.missing:
                    whole.append(job)
        for job in whole:
            if job.probe:
                continue
            model.record.request(
                len(job.lengths),
                total_s=ended - job.arrival,
                queue_s=job.queue_s or 0.0,
                collate_s=job.collate_s,
                run_s=job.run_s,
                reduce_s=job.reduce_s,
            )
        if whole:
            self._loop.call_soon_threadsafe(_resolve, whole)

    def _reject(self, jobs: Sequence[Job], place: _Place, error: ModelfleetError) -> None:
        now = time.monotonic()
        with self._work:
            for job in jobs:
                place.queue.discard(job)
                # Else nobody waits for it any more, or another batch of its rows has failed already.
                if job.missing > 0 and not job.probe:
                    place.model.record.failure(now - job.arrival, fault=not isinstance(error, _CALLERS_FAULTS))
                job.missing = 0  # so that no batch of it that still runs makes it whole
        self._loop.call_soon_threadsafe(_raise, jobs, error)
        if isinstance(error, FatalDeviceError):
            self._loop.call_soon_threadsafe(self._fatal, error)


def _resolve(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_result(job.results)


def _raise(jobs: Sequence[Job], error: ModelfleetError) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


def _trace(job: Job) -> None:
    began = job.arrival + (job.queue_s or 0.0)
    record_stage("queue", job.arrival, began)
    record_stage("run", began, time.monotonic(), rows=len(job.lengths), tokens=sum(job.lengths), session_s=job.run_s)


def _expired(job: Job, now: float) -> DeadlineExpiredError:
    return DeadlineExpiredError(
        f"The deadline passed after {now - job.arrival:.3f} s in the queue; the request was dropped before it ran. "
        "Allow more time, or add workers."
    )


def _draining() -> DrainingError:
    return DrainingError("The worker is shutting down. Retry on another replica.")


def _failure(model: Runnable, error: Exception) -> ModelfleetError:
    if isinstance(error, ModelfleetError):
        return error
    failure = SessionFailureError(f"{model.name} failed on this input. The server's log has the cause.")
    failure.__cause__ = error
    return failure
