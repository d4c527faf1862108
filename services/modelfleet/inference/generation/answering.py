"""
The way of a request for generated text: prompt, tokens, engine, text, chunks.

The model version is held to the end of the stream, so a rollout lets streams finish on the version they began with.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.bundle import Bundle
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.generation import sequences
from modelfleet.inference.generation.detokenization import Detokenization
from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.generation.options import Options
from modelfleet.inference.generation.sequences import Finish, Progress, Usage
from modelfleet.inference.generation.text_stream import StopStrings, TextStream
from modelfleet.inference.metrics import observe_tokenizing
from modelfleet.inference.pipeline import Pipeline
from modelfleet.inference.token_ids import check_token_ids
from modelfleet.inference.tokenization import Tokenization, TokenizeOptions, Truncation
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidInputError, WrongTaskError

_DEFAULT_MAX_TOKENS = 1024
# A text with more of them for each token of the context fits in no tokenizer's way of writing.
_MOST_BYTES_OF_A_TOKEN = 16
# What a prompt ends with decides how the first token's text begins.
_CONTEXT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: exactly one of a text, a conversation, or token ids (int32 [tokens])."""

    text: str = ""
    turns: tuple[Turn, ...] = ()
    template_variables_json: str = ""
    tools_json: str = ""
    token_ids: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of continuation `index`; the last one has a `finish` and its `usage`."""

    version: VersionKey
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish | None = None
    stop: str | None = None
    usage: Usage | None = None


class ChatRenderer(Protocol):
    """The tokenizer service."""

    async def render_chat(self, bundle: Bundle, prompt: Prompt, timeout_s: float) -> str:
        """Return what a model's template writes of a conversation. Raises InvalidInputError for what it refuses."""


@dataclass(eq=False, slots=True)
class _Stream:
    """A continuation whose chunks are made as its progress comes. `new` ids have no text yet, `unsent` no chunk."""

    index: int
    sequence: sequences.Sequence
    text: TextStream
    new: list[int] = field(default_factory=list)
    unsent: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    count: int = 0
    finish: Finish | None = None
    cached_prompt_tokens: int = 0
    done: bool = False

    def take(self, progress: Progress) -> None:
        """Add what a step brought."""
        self.new.extend(progress.token_ids)
        self.logprobs.extend(progress.logprobs)
        self.finish = progress.finish
        self.cached_prompt_tokens = progress.cached_prompt_tokens

    def windows(self) -> tuple[list[int], list[int]]:
        """Return the ids to decode for what is new."""
        new, self.new = self.new, []
        self.unsent.extend(new)
        self.count += len(new)
        return self.text.windows(new)

    def chunk(self, version: VersionKey, known: str, whole: str) -> Chunk | None:
        """Return the chunk of the decoded windows; None where nothing may be sent yet."""
        piece = self.text.advance(known, whole, last=self.finish is not None)
        finish = Finish.STOP_STRING if piece.stop is not None else self.finish
        self.done = finish is not None
        if not piece.text and not self.done:
            return None
        ids, self.unsent = tuple(self.unsent), []
        logprobs, self.logprobs = tuple(self.logprobs), []
        usage = Usage(len(self.sequence.prompt), self.cached_prompt_tokens, self.count) if self.done else None
        return Chunk(version, self.index, piece.text, ids, logprobs, finish, piece.stop, usage)


Arrivals: TypeAlias = "asyncio.Queue[tuple[_Stream, Progress]]"


class Answering:
    """Streams what models generate."""

    def __init__(
        self, pipeline: Pipeline, tokenization: Tokenization, detokenization: Detokenization, chats: ChatRenderer
    ) -> None:
        self._pipeline = pipeline
        self._tokenization = tokenization
        self._detokenization = detokenization
        self._chats = chats

    async def generate(
        self, reference: ModelReference, prompt: Prompt, options: Options, *, client: str, deadline: float
    ) -> AsyncGenerator[Chunk, None]:
        """
        Yield chunks until every continuation has ended.

        `client` is who shares the engine fairly with others; `deadline` is in seconds on the monotonic clock. Leaving
        the iteration gives up what is not generated yet.
        """
        async with self._pipeline.held(reference) as (version, model):
            if not isinstance(model, GenerativeModel):
                raise WrongTaskError(
                    f"{version} is a model of the task {model.manifest.task.value!r}, not {Task.GENERATE.value!r}. "
                    "Call the RPC of its task.",
                    field="model",
                )
            options.check(vocabulary_size=model.manifest.vocabulary_size, max_streams=model.max_streams)
            bundle = self._pipeline.bundle(version)
            _check_size(prompt, model)
            ids = await self._prompt_ids(bundle, prompt, deadline)
            max_tokens = _room(model, ids, options)
            arrivals: Arrivals = asyncio.Queue()
            streams = [
                _stream(index, ids, max_tokens, options, client=client, deadline=deadline, arrivals=arrivals)
                for index in range(options.n)
            ]
            decoding = model.decoding
            decoding.submit([stream.sequence for stream in streams])
            try:
                while not all(stream.done for stream in streams):
                    moved = await _moved(arrivals)
                    chunks = await self._chunks(version, bundle.tokenizer_digest or "", moved)
                    # The engine does not know of stop strings that were just found.
                    stopped = [stream.sequence for stream in moved if stream.done and not stream.finish]
                    decoding.cancel(stopped, Finish.STOP_STRING)
                    for chunk in chunks:
                        yield chunk
            finally:
                decoding.cancel(stream.sequence for stream in streams if not stream.finish)

    async def _chunks(self, version: VersionKey, digest: str, moved: list[_Stream]) -> list[Chunk]:
        windows = [ids for stream in moved for ids in stream.windows()]
        tokens = sum(len(stream.unsent) for stream in moved)
        texts = iter(await self._detokenization.decode(digest, windows, tokens=tokens))
        found = [stream.chunk(version, next(texts), next(texts)) for stream in moved]
        return [chunk for chunk in found if chunk]

    async def _prompt_ids(self, bundle: Bundle, prompt: Prompt, deadline: float) -> NDArray[np.int32]:
        given = [bool(prompt.text), bool(prompt.turns), prompt.token_ids is not None]
        if sum(given) != 1:
            raise InvalidInputError(
                f"{sum(given) or 'None'} of prompt, messages and token_ids are given. Give exactly one.", field="prompt"
            )
        if not prompt.turns and (prompt.template_variables_json or prompt.tools_json):
            raise InvalidInputError(
                "Template variables and tools are for a chat template. Send messages with them.", field="messages"
            )
        if prompt.token_ids is not None:
            return _checked_ids(prompt.token_ids, bundle.manifest)
        text = prompt.text
        if prompt.turns:
            if bundle.chat_template_digest is None:
                raise InvalidInputError(
                    "The model has no chat template. Send it a prompt instead of messages.", field="messages"
                )
            text = await self._chats.render_chat(bundle, prompt, deadline - time.monotonic())
        options = TokenizeOptions(
            tokenizer_digest=bundle.tokenizer_digest or "",
            max_tokens=0,
            truncation=Truncation.FORBIDDEN,
            special_tokens=not prompt.turns,  # templates write them themselves
            rendered=bool(prompt.turns),
        )
        started = time.monotonic()
        tokens = await self._tokenization.tokenize(options, [text], deadline=deadline)
        observe_tokenizing(started)
        if not len(tokens.ids):
            raise InvalidInputError("The prompt has no tokens. Give at least one character.", field="prompt")
        return tokens.ids


async def _moved(arrivals: Arrivals) -> list[_Stream]:
    """Wait for progress, take all that has come, and return whose it was. Raises the error that ended one."""
    ready = [await arrivals.get()]
    while not arrivals.empty():
        ready.append(arrivals.get_nowait())
    moved: dict[int, _Stream] = {}
    for stream, progress in ready:
        if progress.error:
            raise progress.error
        if not stream.done:
            stream.take(progress)
            moved[stream.index] = stream
    return list(moved.values())


def _stream(
    index: int,
    prompt: NDArray[np.int32],
    max_tokens: int,
    options: Options,
    *,
    client: str,
    deadline: float,
    arrivals: Arrivals,
) -> _Stream:
    seed = options.sampling.seed
    sequence = sequences.Sequence(
        prompt=prompt,
        max_tokens=max_tokens,
        options=options,
        seed=None if seed is None else (seed + index) % 2**31,
        client=client,
        arrival=time.monotonic(),
        deadline=deadline,
        emit=lambda progress: arrivals.put_nowait((stream, progress)),
    )
    stream = _Stream(index, sequence, TextStream(StopStrings(options.stop), prompt[-_CONTEXT_TOKENS:].tolist()))
    return stream


def _check_size(prompt: Prompt, model: GenerativeModel) -> None:
    """Raise InvalidInputError for a text that cannot fit, before the tokenizer service reads all of it."""
    most = _MOST_BYTES_OF_A_TOKEN * model.context
    for name, texts in (("prompt", [prompt.text]), ("messages", [turn.content for turn in prompt.turns])):
        size = sum(len(text.encode()) for text in texts)
        if size > most:
            raise InvalidInputError(
                f"{name} has {size} bytes; the {model.context} tokens of {model.name}'s context hold at most {most}. "
                "Shorten it.",
                field=name,
            )


def _room(model: GenerativeModel, prompt: NDArray[np.int32], options: Options) -> int:
    """Return how many tokens to generate at most. Raises InvalidInputError for a prompt that leaves no room."""
    room = model.context - len(prompt)
    if room < 1:
        raise InvalidInputError(
            f"The prompt has {len(prompt)} tokens; the context of {model.name} holds {model.context}, and at least one "
            "must be left to generate. Shorten it.",
            field="prompt",
        )
    if options.max_tokens:
        return min(options.max_tokens, room)
    return min(_DEFAULT_MAX_TOKENS, room, max(1, model.cache_tokens - len(prompt)))


def _checked_ids(ids: NDArray[np.int32], manifest: Manifest) -> NDArray[np.int32]:
    tokens = Tokens.whole(ids, np.array([len(ids)], np.int32))
    assert manifest.max_tokens
    check_token_ids(tokens, manifest.max_tokens, manifest.vocabulary_size, type_count=None)
    return ids
