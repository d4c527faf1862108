"""Where encoding runs: beside the event loop, in pieces, so that a large request does not hold up small ones."""

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from modelfleet.tokenizer.decoder import decode
from modelfleet.tokenizer.encoder import EncodingOptions, Int32s, Tokens, check_repeated, encode
from modelfleet.tokenizer.tokenizers import LoadedTokenizer

# Encoding takes about 0.4 us a character. Work shorter than handing it to a thread and back (0.1 to 0.2 ms of both
# threads' time) is done at once on the event loop.
_INLINE_CHARACTERS = 500
# About 25 ms: how long a request may have to wait for another's piece.
_PIECE_CHARACTERS = 1 << 16
# What a text costs besides its characters, in characters.
_CHARACTERS_PER_TEXT = 5
# Decoding a token costs about as much as encoding four characters.
_CHARACTERS_PER_TOKEN = 4

T = TypeVar("T")


class EncodingThreads:
    """A fixed number of threads; the library releases the GIL. Requests take turns piece by piece."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="encoder")

    async def encode(
        self, tokenizer: LoadedTokenizer, texts: Sequence[str], pairs: Sequence[str], options: EncodingOptions
    ) -> Tokens:
        """Do `encoder.encode`, with its errors. A caller that is gone costs nothing after the piece under way."""
        parts: list[Tokens] = []
        tokens = windowed = 0
        for piece in _pieces(texts, pairs):
            work = functools.partial(encode, tokenizer, texts[piece], pairs[piece], options, first_index=piece.start)
            characters = sum(map(len, texts[piece])) + sum(map(len, pairs[piece]))
            parts.append(await self._run(work, characters + _CHARACTERS_PER_TEXT * len(texts[piece])))
            tokens += int(parts[-1].token_counts.sum())
            windowed += len(parts[-1].ids)
            check_repeated(tokens, windowed, options)  # each piece alone may be within the bounds
        return parts[0] if len(parts) == 1 else _joined(parts)

    async def decode(
        self,
        tokenizer: LoadedTokenizer,
        ids: Int32s,
        lengths: Int32s,
        *,
        keep_special_tokens: bool,
        skip_unknown_ids: bool,
    ) -> list[str]:
        """Do `decoder.decode`, with its errors."""
        work = functools.partial(
            decode,
            *(tokenizer, ids, lengths),
            keep_special_tokens=keep_special_tokens,
            skip_unknown_ids=skip_unknown_ids,
        )
        return await self._run(work, len(ids) * _CHARACTERS_PER_TOKEN)

    def close(self) -> None:
        """Let the threads end once their work under way is done."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T], characters: int) -> T:
        if characters <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _pieces(texts: Sequence[str], pairs: Sequence[str]) -> Iterator[slice]:
    """Cut a request where a piece has enough characters; a text is never cut."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text) + (len(pairs[index]) if pairs else 0)
        if characters >= _PIECE_CHARACTERS:
            yield slice(start, index + 1)
            start, characters = index + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """Put pieces together. An array left empty because it would say nothing new is filled in if another has it."""
    type_ids = any(part.type_ids.size for part in parts)
    window_counts = any(part.window_counts.size for part in parts)
    return Tokens(
        ids=np.concatenate([part.ids for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        type_ids=np.concatenate(
            [
                part.type_ids if part.type_ids.size or not type_ids else np.zeros(len(part.ids), np.uint8)
                for part in parts
            ]
        ),
        offsets=np.concatenate([part.offsets for part in parts]),
        window_counts=np.concatenate(
            [
                part.window_counts
                if part.window_counts.size or not window_counts
                else np.ones(len(part.token_counts), np.int32)
                for part in parts
            ]
        ),
        token_counts=np.concatenate([part.token_counts for part in parts]),
    )
