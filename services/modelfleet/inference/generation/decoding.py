"""
The thread that owns a model's engines: continuations join and leave between steps.

Only this thread touches what is the library's; the event loop hands it sequences and cancellations, and hears of each
step's progress in one call. With paged attention one engine holds every sequence. Without it an engine runs a batch as
a whole, so each batch has an engine of its own and they take turns: whoever comes need not wait for a batch to end.
"""

import asyncio
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from modelfleet.inference.generation.fair_queue import FairQueue
from modelfleet.inference.generation.genai import GenaiModel
from modelfleet.inference.generation.lanes import EngineLane, GeneratorLane, Lane, Step
from modelfleet.inference.generation.metrics import DecodingSeries
from modelfleet.inference.generation.sequences import Finish, Progress, Sequence
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    InvalidInputError,
    ModelfleetError,
    ModelLoadingError,
    OverloadedError,
    SessionFailureError,
)

_log = structlog.get_logger()

# A batch that cannot be joined later waits so long for company. A prompt takes many times longer to read.
_GATHER_S = 0.01
# Tokens of prompts, padded, that such a batch may read in its first step, during which all others wait; and the piece
# in which a longer prompt is read instead, by itself.
_BATCH_PROMPT_TOKENS = 512
_PIECE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class DecodingLimits:
    """Most sequences at once, most tokens that their cache may hold, most tokens that wait."""

    max_streams: int
    cache_tokens: int
    max_queue_tokens: int


class Decoding:
    """Continues sequences. `submit`, `cancel` and `close` belong to the event loop in which it was made."""

    def __init__(self, name: str, model: GenaiModel, limits: DecodingLimits, record: ModelRecord) -> None:
        self._name = name
        self._model = model
        self._limits = limits
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._work = threading.Condition()
        self._queue: FairQueue[Sequence] = FairQueue()
        self._gone: set[Sequence] = set()
        self._closing = False
        self._lanes: list[Lane] = []
        self._active = self._reserved = 0
        self._series = DecodingSeries(
            name,
            active=lambda: self._active,
            waiting=lambda: len(self._queue),
            reserved=lambda: self._reserved,
            cache_tokens=limits.cache_tokens,
        )
        self._thread = threading.Thread(target=self._run, name=f"decoding {name}", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """
        Queue all sequences of a request, or none.

        Raises InvalidInputError for one that never fits, OverloadedError for a full queue.
        """
        for one in sequences:
            if one.cost > self._limits.cache_tokens:
                raise InvalidInputError(
                    f"The prompt's {len(one.prompt)} tokens and max_tokens {one.max_tokens} make {one.cost}; the cache "
                    f"of this worker holds {self._limits.cache_tokens}. Lower max_tokens.",
                    field="max_tokens",
                )
        cost = sum(one.cost for one in sequences)
        with self._work:
            if self._closing:
                raise ModelLoadingError(f"{self._name} is being unloaded on this worker. Retry.")
            if self._queue.tokens and self._queue.tokens + cost > self._limits.max_queue_tokens:
                raise OverloadedError(
                    f"{self._queue.tokens} tokens wait for {self._name}; with {cost} more they would pass the "
                    f"{self._limits.max_queue_tokens} of max_queue_tokens. Retry later."
                )
            for one in sequences:
                self._queue.put(one)
            self._work.notify()

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Give sequences up, wherever they are; nothing is emitted for them any more after the next step."""
        with self._work:
            waiting = set(self._queue)
            for one in sequences:
                if one in waiting:
                    self._queue.drop(one)
                    self._series.finished("CANCELLED")
                else:
                    self._gone.add(one)
            self._work.notify()

    async def close(self) -> None:
        """End the thread; what still runs or waits is emitted as CANCELLED."""
        with self._work:
            self._closing = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join)
        self._series.forget()

    def _run(self) -> None:
        try:
            while self._wait():
                self._deliver([*self._dropped(), *self._admitted()])
                self._step()
                # A paged engine is kept for its prefixes; any other gives its cache back with its last sequence.
                kept = [lane for lane in self._lanes if lane.sequences or (self._model.paged and lane.engine)]
                self._lanes = kept
                self._active = sum(len(lane.sequences) for lane in kept)
                self._reserved = sum(lane.reserved for lane in kept)
        finally:
            with self._work:
                self._closing = True
                left = [*self._queue, *(one for lane in self._lanes for one in lane.sequences)]
            self._lanes.clear()
            self._deliver([(one, Progress(finish=Finish.CANCELLED)) for one in left])

    def _wait(self) -> bool:
        """Return True once there is something to do, False when it is over."""
        with self._work:
            while not self._closing:
                if any(lane.sequences for lane in self._lanes):
                    return True
                gather_s = self._gather_s()
                if gather_s == 0:
                    return True
                self._work.wait(gather_s)
            return False

    def _gather_s(self) -> float | None:
        """Return how long those that wait should go on for company; None while none waits."""
        if not len(self._queue):
            return None
        if self._model.paged or len(self._queue) >= self._model.batch_rows:
            return 0
        return max(0, min(one.arrival for one in self._queue) + _GATHER_S - time.monotonic())

    def _dropped(self) -> Step:
        """Let go of those whose caller has left or whose deadline has passed."""
        now = time.monotonic()
        expired: Step = []
        with self._work:
            gone, self._gone = self._gone, set()
            for one in [one for one in self._queue if one.deadline <= now]:
                self._queue.drop(one)
                expired.append((one, _expired(one)))
        for lane in self._lanes:
            for one in lane.sequences:
                if one in gone:
                    lane.cancel(one)
                    self._series.finished("CANCELLED")
                elif one.deadline <= now:
                    lane.cancel(one)
                    expired.append((one, _expired(one)))
        return expired

    def _admitted(self) -> Step:
        """Give lanes to those that are next and fit."""
        refused: Step = []
        while batch := self._next_batch():
            if self._needs_generator(batch[0]):
                try:
                    self._lanes.append(GeneratorLane(self._model, batch[0], _PIECE_TOKENS))
                except ModelfleetError as error:
                    refused.append((batch[0], Progress(error=error)))
                continue
            lane = next((lane for lane in self._lanes if self._model.paged and lane.engine), None)
            if lane is None:
                lane = EngineLane(self._model)
                self._lanes.append(lane)
            assert isinstance(lane, EngineLane)
            refused += lane.add(batch)
        return refused

    def _next_batch(self) -> list[Sequence]:
        """Take those off the queue that share a lane; empty when none is next or the next one does not fit."""
        batch: list[Sequence] = []
        with self._work:
            if self._gather_s() != 0 and not self._closing:
                return batch
            while heads := self._queue.heads():
                head = heads[0]  # and no other: what is next is never passed over for what is smaller
                if not self._fits([*batch, head]) or (batch and not self._shares(batch, head)):
                    break
                self._queue.take(head)
                batch.append(head)
                if self._needs_generator(head):
                    break
        return batch

    def _fits(self, batch: list[Sequence]) -> bool:
        streams = sum(len(lane.sequences) for lane in self._lanes) + len(batch)
        reserved = sum(lane.reserved for lane in self._lanes)
        if self._model.paged:
            reserved += sum(one.cost for one in batch)
        else:
            reserved += len(batch) * max(one.cost for one in batch)
        return streams <= self._limits.max_streams and reserved <= self._limits.cache_tokens

    def _shares(self, batch: list[Sequence], one: Sequence) -> bool:
        if self._needs_generator(one):
            return False
        if self._model.paged:
            return True
        longest = max(len(other.prompt) for other in (*batch, one))
        rows = len(batch) + 1
        return rows <= self._model.batch_rows and rows * longest <= _BATCH_PROMPT_TOKENS

    def _needs_generator(self, one: Sequence) -> bool:
        if self._model.paged:
            return one.options.logprobs
        return one.options.logprobs or one.seed is not None or len(one.prompt) > _BATCH_PROMPT_TOKENS

    def _step(self) -> None:
        """Step each lane, and tell of each at once: what reads a long prompt comes last and takes longest."""
        reading = [lane for lane in self._lanes if isinstance(lane, GeneratorLane) and lane.reading]
        if reading:  # one piece of one prompt; its lane goes to the end, so that prompts take turns
            self._lanes.remove(reading[0])
            self._lanes.append(reading[0])
        waiting = set(map(id, reading[1:]))
        for lane in self._lanes:
            if not lane.sequences or id(lane) in waiting:
                continue
            try:
                step = lane.step()
            except Exception as error:  # noqa: BLE001  whatever it is, this lane is lost, and it alone
                _log.warning("a lane of the engine failed", model=self._name, exc_info=error)
                failure = SessionFailureError("The engine failed while it generated. Retry.")
                step = [(one, Progress(error=failure)) for one in lane.sequences]
                self._lanes = [other for other in self._lanes if other is not lane]
            self._deliver(step)

    def _deliver(self, step: Step) -> None:
        now = time.monotonic()
        for one, progress in step:
            if not one.probe:
                self._observe(one, progress, now)
            one.generated += len(progress.token_ids)
        if step:
            self._loop.call_soon_threadsafe(_emit, step)

    def _observe(self, one: Sequence, progress: Progress, now: float) -> None:
        if progress.token_ids:
            if one.generated == 0:
                one.first_token = now
                self._series.first_token.observe(now - one.arrival)
                self._series.tokens_in.inc(len(one.prompt))
            else:
                self._series.token.observe(now - one.last_token)
            one.last_token = now
            self._series.tokens_out.inc(len(progress.token_ids))
        if progress.error:
            fault = not isinstance(progress.error, InvalidInputError | DeadlineExpiredError)
            self._record.failure(now - one.arrival, fault=fault)
            self._series.finished(progress.error.reason.value)
        elif progress.finish:
            self._series.tokens_cached.inc(progress.cached_prompt_tokens)
            self._series.finished(progress.finish.value)
            # The time to the first token is what one version's may be compared with another's; the rest is as long as
            # the text.
            first_s = (one.first_token or now) - one.arrival
            self._record.request(
                1, total_s=first_s, queue_s=0, collate_s=0, run_s=now - one.arrival - first_s, reduce_s=0
            )


def _emit(step: Step) -> None:
    for one, progress in step:
        one.emit(progress)


def _expired(one: Sequence) -> Progress:
    return Progress(
        error=DeadlineExpiredError(
            f"The deadline passed after {one.generated} of at most {one.max_tokens} tokens. Allow more time."
        )
    )
