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
from typing import Any

from modelfleet.inference import metrics
from modelfleet.inference.batching import BatchQueue, Row
from modelfleet.inference.jobs import Batch, Job, Place, Runnable
from modelfleet.inference.outcomes import Outcomes, draining, expired, failure, trace
from modelfleet.runtime.errors import FatalDeviceError, ModelLoadingError, OverloadedError


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
        self._places: dict[Runnable, Place] = {}
        self._running: set[Batch] = set()
        self._stopping = False
        self.batches_ended = 0
        """Grows while anything is run: a sign of life."""
        self._work = threading.Condition()
        self._outcomes = Outcomes(self._loop, self._work)
        self._threads = [threading.Thread(target=self._serve, name=f"engine-{n}") for n in range(lanes + 1)]
        for thread in self._threads:
            thread.start()

    def attach(self, model: Runnable) -> None:
        """Give a model a queue."""
        queue: BatchQueue[Job] = BatchQueue(model.limits)
        with self._work:
            self._places[model] = Place(model, queue, metrics.ModelSeries(model.name, lambda: queue.rows))

    def detach(self, model: Runnable) -> None:
        """Take a model's queue away. What still waits in it never runs: drain first."""
        with self._work:
            del self._places[model]

    def on_fatal_error(self, listener: Callable[[FatalDeviceError], None]) -> None:
        """Have `listener` called, in the event loop, when the device has failed for good."""
        self._outcomes.fatal = listener

    def device_failed(self, error: FatalDeviceError) -> None:
        """Tell that listener of a failure under what this engine does not run: generation has threads of its own."""
        self._outcomes.fatal(error)

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
            self._outcomes.reject(place.queue.requests(), place, draining())

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
        DeadlineExpiredError, DrainingError, FatalDeviceError, or RowsFailedError where rows have no result.
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
        trace(job)
        return results

    def _admit(self, model: Runnable, job: Job) -> Place:
        if self._stopping:
            raise draining()
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

    def _abandon(self, place: Place, job: Job) -> None:
        self._outcomes.leave(job, place)
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

    def _next(self) -> Batch | None:
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

    def _form(self) -> Batch | None:
        now = time.monotonic()
        for place in sorted(self._places.values(), key=lambda place: place.last_turn):
            for job in place.queue.take_expired(now):
                self._outcomes.reject([job], place, expired(job, now))
            if rows := place.queue.take_batch(now):
                place.last_turn = now
                return Batch(place, rows, place.model.new_cancellation(), now)
        return None

    def _free(self, batch: Batch) -> None:
        with self._work:
            self._running.discard(batch)
            self.batches_ended += 1
            self._free_lanes += 1
            self._work.notify()

    def _run(self, batch: Batch) -> Any:
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

    def _finish(self, batch: Batch, outputs: tuple[Any, float, float]) -> None:
        try:
            self._outcomes.finish(batch, outputs)
        except Exception as error:  # noqa: BLE001  as in _serve_batch
            self._isolate(batch, error)

    def _isolate(self, batch: Batch, error: Exception) -> None:
        """Run the halves of a failed batch, and theirs, until the rows are found that fail alone."""
        if isinstance(error, FatalDeviceError) or (len(batch.rows) == 1 and isinstance(error, OverloadedError)):
            self._outcomes.reject(batch.jobs, batch.place, error)
        elif len(batch.rows) == 1:
            self._outcomes.fail(batch, failure(batch.place.model, error))
        else:
            middle = len(batch.rows) // 2
            self._run_again(batch, batch.rows[:middle])
            self._run_again(batch, batch.rows[middle:])

    def _run_again(self, batch: Batch, rows: Sequence[Row[Job]]) -> None:
        with self._work:
            awaited = [row for row in rows if not row.request.future.done()]
            if not awaited:
                return
            part = Batch(batch.place, awaited, batch.place.model.new_cancellation(), time.monotonic())
            self._running.add(part)
        failed: Exception | None = None
        try:
            outputs = self._run(part)
        except Exception as error:  # noqa: BLE001  as in _serve_batch
            failed = error
        finally:
            with self._work:
                self._running.discard(part)
                self.batches_ended += 1
        if failed:
            self._isolate(part, failed)
        else:
            self._finish(part, outputs)
