"""What runs continuations: the library's engine, and its generator for what the engine cannot do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime_genai as og

from modelfleet.inference.generation.genai import ADAPTER, GenaiModel
from modelfleet.inference.generation.sequences import Finish, Progress, Sequence
from modelfleet.runtime.errors import InvalidInputError, ModelfleetError, SessionFailureError

_EVENTS = 256

_FINISHES = {
    og.FinishReason.EOS: Finish.STOP,
    og.FinishReason.MAX_GENERATED_TOKENS: Finish.LENGTH,
    og.FinishReason.MAX_SESSION_TOKENS: Finish.LENGTH,
    og.FinishReason.CANCELLED: Finish.CANCELLED,
}

Step = list[tuple[Sequence, Progress]]


class Lane(Protocol):
    """Runs sequences step by step. Every method belongs to the one thread that made it."""

    reserved: int
    """Tokens that its cache may hold."""
    engine: bool
    """Whether it takes several sequences."""

    @property
    def sequences(self) -> list[Sequence]:
        """Those that go on."""
        ...

    def step(self) -> Step:
        """Compute one token of each sequence, or a piece of a prompt. Raises what the library raises."""
        ...

    def cancel(self, sequence: Sequence) -> None:
        """Give a sequence up before the next step."""
        ...


@dataclass(slots=True)
class _Row:
    sequence: Sequence
    request: og.Request
    turn: int


class EngineLane:
    """
    An `og.Engine`. A paged one takes sequences at any time; any other runs the batch that it is given first.

    Sequences beyond the first batch of such an engine would wait in it for that batch's end; they get a lane of their
    own.
    """

    engine = True

    def __init__(self, model: GenaiModel) -> None:
        self._paged = model.paged
        self._engine = og.Engine(model.model)
        self._events = self._engine.create_event_buffer(_EVENTS)
        self._rows: dict[int, _Row] = {}
        self.reserved = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Those that go on."""
        return [row.sequence for row in self._rows.values()]

    def add(self, sequences: Iterable[Sequence]) -> Step:
        """Take sequences that all fit; return the ends of those that the library refuses."""
        refused: Step = []
        for sequence in sequences:
            try:
                row = self._begun(sequence)
            except RuntimeError as error:
                refused.append((sequence, Progress(error=lost(sequence, error))))
            else:
                self._rows[id(row.request)] = row
        if self._paged:
            self.reserved += sum(sequence.cost for sequence in sequences)
        else:  # its cache is one block, as long as the longest for all
            self.reserved = len(self._rows) * max((one.cost for one in self.sequences), default=0)
        return refused

    def _begun(self, sequence: Sequence) -> _Row:
        limits = og.RequestOptions()
        limits.set_max_session_tokens(sequence.cost)
        request = self._engine.create_request(options=limits)
        try:
            turn = request.begin_turn(sequence.prompt, self._turn_options(request, sequence))
        except RuntimeError:
            request.close()
            raise
        return _Row(sequence, request, turn)

    def _turn_options(self, request: og.Request, sequence: Sequence) -> og.TurnOptions:
        turn, sampling = og.TurnOptions(request), sequence.options.sampling
        turn.set_max_generated_tokens(sequence.max_tokens)
        if sampling.random is not None:
            turn.set_do_sample(sampling.random)
        if sampling.random and sampling.temperature is not None:
            turn.set_temperature(sampling.temperature)
        if sampling.random and sampling.top_k is not None:
            turn.set_top_k(sampling.top_k)
        if sampling.random and sampling.top_p is not None:
            turn.set_top_p(sampling.top_p)
        if sampling.repetition_penalty is not None:
            turn.set_repetition_penalty(sampling.repetition_penalty)
        if sequence.seed is not None:
            turn.set_seed(sequence.seed)
        if guidance := sequence.options.guidance:
            turn.set_guidance(guidance.grammar.value, guidance.bounded)
        return turn

    def step(self) -> Step:
        """Compute one token of each sequence."""
        done: Step = []
        for event in self._engine.run(self._events):
            row = self._rows.get(id(event.request))
            if row is None:  # cancelled meanwhile
                continue
            flags = int(event.flags)
            failed = bool(flags & int(og.EngineEventFlags.FAILED))
            finished = bool(flags & int(og.EngineEventFlags.TURN_FINISHED))
            if failed and not flags & int(og.EngineEventFlags.RETRYABLE):
                done.append((row.sequence, Progress(error=lost(row.sequence, event.error_code.name.lower()))))
                self._remove(row)
                continue
            if not finished and not flags & int(og.EngineEventFlags.TOKEN):
                continue  # it waits for room in the cache
            progress = Progress(
                token_ids=(event.token,) if flags & int(og.EngineEventFlags.TOKEN) else (),
                finish=_FINISHES.get(event.finish_reason, Finish.STOP) if finished else None,
                cached_prompt_tokens=event.usage.cached_prompt_tokens if finished else 0,
            )
            done.append((row.sequence, progress))
            if finished:
                self._remove(row)
        return done

    def cancel(self, sequence: Sequence) -> None:
        """Give a sequence up; the engine computes nothing for it any more."""
        row = next((row for row in self._rows.values() if row.sequence is sequence), None)
        if row:
            row.request.cancel_turn(row.turn)
            self._remove(row)

    def _remove(self, row: _Row) -> None:
        del self._rows[id(row.request)]
        row.request.close()
        if self._paged:
            self.reserved -= row.sequence.cost


class GeneratorLane:
    """
    An `og.Generator` for one sequence: seeds and long prompts without paged attention, log-probabilities, adapters.

    It takes prompts in pieces of `chunk` tokens, between which others are served.
    """

    engine = False

    def __init__(self, model: GenaiModel, sequence: Sequence, chunk: int) -> None:
        self._sequence = sequence
        self._eos = model.eos_token_ids
        self._chunk = chunk
        # The library goes on from the last token of a piece that is no padding, also where padding is what was given.
        self._last_alone = int(sequence.prompt[-1]) in model.pad_token_ids
        self._done = 0
        self._ended = False
        self.reserved = sequence.cost
        self._generator = og.Generator(model.model, self._parameters(model, sequence))
        if model.adapters:
            self._generator.set_active_adapter(model.adapters, ADAPTER)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that go on."""
        return [] if self._ended else [self._sequence]

    @property
    def reading(self) -> bool:
        """Whether a part of the prompt is left."""
        return self._done < len(self._sequence.prompt)

    def step(self) -> Step:
        """Compute one token, or a piece of the prompt."""
        if self.reading:
            left = len(self._sequence.prompt) - self._done
            size = min(self._chunk, left - 1 if self._last_alone and left > 1 else left)
            piece = self._sequence.prompt[self._done : self._done + size]
            self._generator.append_tokens(piece.copy())  # the library takes only what it could write to
            self._done += len(piece)
            return []
        logits = self._generator.get_logits()[0, -1].astype(np.float64) if self._sequence.options.logprobs else None
        self._generator.generate_next_token()
        token = int(self._generator.get_next_tokens()[0])
        ended = token in self._eos
        full = self._generator.is_done() or self._sequence.generated + 1 >= self._sequence.max_tokens
        finish = Finish.STOP if ended else Finish.LENGTH if full else None
        self._ended = finish is not None
        logprobs = () if logits is None or ended else (_logprob(logits, token),)
        return [(self._sequence, Progress(() if ended else (token,), logprobs, finish))]

    def cancel(self, sequence: Sequence) -> None:
        """Give it up."""
        del sequence
        self._ended = True

    @staticmethod
    def _parameters(model: GenaiModel, sequence: Sequence) -> og.GeneratorParams:
        sampling = sequence.options.sampling
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        found = {
            "do_sample": sampling.random,
            "repetition_penalty": sampling.repetition_penalty,
            "random_seed": sequence.seed,
            **(drawn if sampling.random else {}),
        }
        parameters = og.GeneratorParams(model.model)
        known = {key: value for key, value in found.items() if value is not None}
        parameters.set_search_options(max_length=sequence.cost, batch_size=1, **known)
        if guidance := sequence.options.guidance:
            parameters.set_guidance(guidance.grammar.value, guidance.bounded)
        return parameters


def _logprob(logits: "np.ndarray[tuple[int], np.dtype[np.float64]]", token: int) -> float:
    most = logits.max()
    return float(logits[token] - most - np.log(np.exp(logits - most).sum()))


def lost(sequence: Sequence, cause: object) -> ModelfleetError:
    """Return what the caller of a sequence is told when the library refused it, or failed in the middle of it."""
    if guidance := sequence.options.guidance:
        kind = guidance.grammar.value.replace("_", " ")
        if "grammar" in str(cause):
            return InvalidInputError(f"The guidance is no {kind} that can be used: {cause}", field="guidance")
        return InvalidInputError(
            f"The engine failed while it kept to this {kind} ({cause}): it may be too large. Simplify it.",
            field="guidance",
        )
    failure = SessionFailureError("The engine failed while it generated. Retry.")
    failure.__cause__ = cause if isinstance(cause, Exception) else RuntimeError(cause)
    return failure
