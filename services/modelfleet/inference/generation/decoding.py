"""
The thread that owns a model's engines: continuations join and leave between steps.

Only this thread touches what is the library's; the event loop hands it sequences and cancellations, and hears of each
step's progress in one call. With paged attention one engine holds every sequence. Without it an engine runs a batch as
a whole, so each batch has an engine of its own and they take turns: whoever comes need not wait for a batch to end.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from modelfleet.inference.generation.fair_queue import FairQueue
from modelfleet.inference.generation.genai import GenaiModel
from modelfleet.inference.generation.lanes import EngineLane, GeneratorLane, Lane, Step, lost
from modelfleet.inference.generation.metrics import DecodingSeries
from modelfleet.inference.generation.sequences import Finish, Progress, Sequence
from modelfleet.inference.session import device_failure
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    FatalDeviceError,
    InvalidInputError,
    ModelLoadingError,
    OverloadedError,
)

_log = structlog.get_logger()

# A batch that cannot be joined later waits so long for company. A prompt takes many times longer to read.
_GATHER_S = 0.01
_CLOSE_S = 10.0
# The piece in which a prompt is read that is too long for a batch, by itself. Half of it takes longer for the whole.
_PIECE_TOKENS = 64

BATCH_PROMPT_TOKENS = 512
"""Tokens of prompts, padded, that a batch without paged attention may read at once, during which all others wait."""


@dataclass(frozen=True, slots=True)
class DecodingLimits:
    """Most sequences at once, most tokens that their cache may hold, most tokens that wait."""

    max_streams: int
    cache_tokens: int
    max_queue_tokens: int


class Decoding:
    """
    Continues sequences. `submit`, `cancel` and `close` belong to the event loop in which it was made.

    `failed` is called there when the device, or the thread itself, has failed: nothing is generated any more.
    """

    def __init__(
        self,
        name: str,
        model: GenaiModel,
        limits: DecodingLimits,
        record: ModelRecord,
        failed: Callable[[FatalDeviceError], None],
    ) -> None:
        self._name = name
        self._model = model
        self._limits = limits
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._work = threading.Condition()
        self._queue: FairQueue[Sequence] = FairQueue()
        self._ahead: list[Sequence] = []
        self._gone: dict[Sequence, Finish] = {}
        self._closing = False
        self._failure: FatalDeviceError | None = None
        self._lanes: list[Lane] = []
        self._active = self._reserved = 0
        self._began: float | None = None
        self.batches_ended = 0
        """Grows with each step of a lane: a sign of life."""
        self._series = DecodingSeries(
            name,
            record,
            active=lambda: self._active,
            waiting=lambda: len(self._queue),
            reserved=lambda: self._reserved,
            cache_tokens=limits.cache_tokens,
        )
        self._thread = threading.Thread(target=self._run, name=f"decoding {name}", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence], *, ahead: bool = False) -> None:
        """
        Queue all sequences of a request, or none. Those that go `ahead` pass the queue and its limits.

        Raises InvalidInputError for one that never fits, OverloadedError for a full queue, FatalDeviceError.
        """
        for one in sequences:
            if one.cost > self._limits.cache_tokens:
                raise InvalidInputError(
                    f"The prompt's {len(one.prompt)} tokens and max_tokens {one.max_tokens} make {one.cost}; the cache "
                    f"of this worker holds {self._limits.cache_tokens}. Lower max_tokens, or shorten the prompt.",
                    field="max_tokens",
                )
        cost = sum(one.cost for one in sequences)
        with self._work:
            if self._failure:
                raise self._ended()
            if self._closing:
                raise ModelLoadingError(f"{self._name} is being unloaded on this worker. Retry.")
            if ahead:
                self._ahead.extend(sequences)
            elif self._queue.tokens and self._queue.tokens + cost > self._limits.max_queue_tokens:
                raise OverloadedError(
                    f"{self._queue.tokens} tokens wait for {self._name}; with {cost} more they would pass the "
                    f"{self._limits.max_queue_tokens} of max_queue_tokens. Retry later."
                )
            else:
                for one in sequences:
                    self._queue.put(one)
            self._work.notify()

    def cancel(self, sequences: Iterable[Sequence], finish: Finish = Finish.CANCELLED) -> None:
        """
        Give sequences up, wherever they are; nothing is emitted for them any more after the next step.

        `finish` is what they count as: a stop string ends one as well as the engine does.
        """
        with self._work:
            waiting = set(self._queue)
            for one in sequences:
                if one in waiting:
                    self._queue.drop(one)
                    self._series.finished(finish.value)
                elif one in self._ahead:
                    self._ahead.remove(one)
                else:
                    self._gone.setdefault(one, finish)
            self._work.notify()

    def longest_run_s(self) -> float:
        """Return for how long the step that runs now has been running, in seconds; 0 when none runs."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def close(self) -> None:
        """
        End the thread; what still runs or waits is emitted as CANCELLED.

        A thread whose step does not end is left behind, and keeps no process from its end.
        """
        with self._work:
            self._closing = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        if self._thread.is_alive():
            _log.error("a step of the engine does not end; its thread is left behind", model=self._name)
        self._series.forget()

    # From here on: the thread.

    def _run(self) -> None:
        end = Progress(finish=Finish.CANCELLED)
        try:
            while not self._failure and self._wait():
                self._began = time.monotonic()
                self._deliver([*self._dropped(), *self._admitted()])
                self._step()
                # A paged engine is kept for its prefixes; any other gives its cache back with its last sequence.
                kept = [lane for lane in self._lanes if lane.sequences or (self._model.paged and lane.engine)]
                self._lanes = kept
                self._active = sum(len(lane.sequences) for lane in kept)
                self._reserved = sum(lane.reserved for lane in kept)
                self._began = None
        except BaseException as error:  # noqa: BLE001  a fault of ours, or a panic of the library's: tell, do not hang
            _log.critical("the thread that generates has failed", model=self._name, exc_info=error)
            self._failure = self._ended()
            self._failure.__cause__ = error
        if self._failure:
            end = Progress(error=self._failure)
        with self._work:
            self._closing = True
            left = [*self._ahead, *self._queue, *(one for lane in self._lanes for one in lane.sequences)]
        self._lanes.clear()
        self._active = self._reserved = 0
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._deliver([(one, end) for one in left])
            if self._failure:
                self._loop.call_soon_threadsafe(self._failed, self._failure)

    def _ended(self) -> FatalDeviceError:
        return FatalDeviceError(f"{self._name} can no longer generate on this worker. Retry; another replica answers.")

    def _wait(self) -> bool:
        """Return True once there is something to do, False when it is over."""
        with self._work:
            while not self._closing:
                if self._ahead or any(lane.sequences for lane in self._lanes):
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
            gone, self._gone = self._gone, {}
            for one in [one for one in self._queue if one.deadline <= now]:
                self._queue.drop(one)
                expired.append((one, _expired(one)))
        for lane in self._lanes:
            for one in lane.sequences:
                if one in gone:
                    lane.cancel(one)
                    self._series.observe(one, Progress(finish=gone[one]), now)
                elif one.deadline <= now:
                    lane.cancel(one)
                    expired.append((one, _expired(one)))
        return expired

    def _admitted(self) -> Step:
        """Give lanes to those that are next and fit; return the ends of those that the library refuses."""
        refused: Step = []
        while batch := self._next_batch():
            try:
                refused += self._begin(batch)
            except Exception as error:  # noqa: BLE001  whatever it is, these are lost, and they alone
                refused += self._lost(batch, error)
            if batch[0].options.guidance:
                break  # reading a grammar may take a second, so that all others take a step before the next one
        return refused

    def _begin(self, batch: list[Sequence]) -> Step:
        if self._needs_generator(batch[0]):
            self._lanes.append(GeneratorLane(self._model, batch[0], _PIECE_TOKENS))
            return []
        lane = next((lane for lane in self._lanes if self._model.paged and lane.engine), None)
        if lane is None:
            lane = EngineLane(self._model)
            self._lanes.append(lane)
        assert isinstance(lane, EngineLane)
        return lane.add(batch)

    def _next_batch(self) -> list[Sequence]:
        """Take those off the queue that share a lane; empty when none is next or the next one does not fit."""
        batch: list[Sequence] = []
        with self._work:
            if self._ahead:
                return [self._ahead.pop(0)]
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
        # A grammar that outgrows the library's limits fails the whole batch. Whose grammar is the same shares its fate.
        if batch[0].options.guidance != one.options.guidance:
            return False
        longest = max(len(other.prompt) for other in (*batch, one))
        rows = len(batch) + 1
        return rows <= self._model.batch_rows and rows * longest <= BATCH_PROMPT_TOKENS

    def _needs_generator(self, one: Sequence) -> bool:
        if one.options.logprobs or self._model.adapters:
            return True
        if self._model.paged:
            return False
        return one.seed is not None or len(one.prompt) > BATCH_PROMPT_TOKENS

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
            self._began = time.monotonic()
            try:
                step = lane.step()
            except Exception as error:  # noqa: BLE001  whatever it is, this lane is lost, and it alone
                step = self._lost(lane.sequences, error)
                self._lanes = [other for other in self._lanes if other is not lane]
            self.batches_ended += 1
            self._deliver(step)

    def _lost(self, sequences: list[Sequence], error: Exception) -> Step:
        """Return the ends of sequences whose lane has failed."""
        _log.warning("a lane of the engine failed", model=self._name, sequences=len(sequences), reason=str(error))
        failure = device_failure(error, self._model.device)
        if isinstance(failure, FatalDeviceError):
            failure.__cause__, self._failure = error, failure
        return [(one, Progress(error=failure or lost(one, error))) for one in sequences]

    def _deliver(self, step: Step) -> None:
        now = time.monotonic()
        for one, progress in step:
            self._series.observe(one, progress, now)
            one.generated += len(progress.token_ids)
        if step:
            self._loop.call_soon_threadsafe(_emit, step)


def _emit(step: Step) -> None:
    for one, progress in step:
        one.emit(progress)


def _expired(one: Sequence) -> Progress:
    return Progress(
        error=DeadlineExpiredError(
            f"The deadline passed after {one.generated} of at most {one.max_tokens} tokens. Allow more time."
        )
    )
