"""Tokenizers by the digest of their `tokenizer.json`: from memory, else from disk, else from the manager."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import tokenizers

from modelfleet.bundle.bundle import check_sha256
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, ManagerUnreachableError
from modelfleet.tokenizer import metrics
from modelfleet.tokenizer.control_tokens import Spellings, spellings
from modelfleet.tokenizer.disk_cache import DiskCache, check_content
from modelfleet.tokenizer.prefetching import Kind, NeededFile

_log = structlog.get_logger()

_PROBE = "a"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is no part of any text, and its id."""

    content: str
    id: int


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """
    A tokenizer that cuts and pads nothing on its own, and what is known of it.

    `library` is shared by threads: nothing may change its state.
    `vocabulary_size` is one more than the highest token id.
    `special_tokens` are ordered by id.
    `added_to_single` and `added_to_pair` count the special tokens that a single text or a pair is wrapped in.
    `type_ids_of` holds (is pair, has special tokens) where an encoding can have type ids other than 0.
    """

    digest: str
    library: tokenizers.Tokenizer
    vocabulary_size: int
    special_tokens: tuple[SpecialToken, ...]
    added_to_single: int
    added_to_pair: int
    type_ids_of: frozenset[tuple[bool, bool]]
    spellings: Spellings = None
    """What finds the special tokens in a text."""


class TokenizerStore:
    """
    Keeps the `limit` tokenizers used last in memory; `fetch` returns the bytes of a `tokenizer.json` by digest.

    Requests that need a tokenizer while it loads share that load.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[bytes]], disk: DiskCache, limit: int) -> None:
        self._fetch = fetch
        self._disk = disk
        self._limit = limit
        self._loaded: OrderedDict[str, LoadedTokenizer] = OrderedDict()
        self._loading: dict[str, asyncio.Task[LoadedTokenizer]] = {}

    async def get(self, digest: str, *, wait_s: float | None = None) -> LoadedTokenizer:
        """
        Return the tokenizer, waiting at most `wait_s` seconds for its load, which goes on after that.

        Raises InvalidInputError for what is no digest, InvalidBundleError for a file that is no tokenizer,
        ManagerUnreachableError when the wait is over, and whatever `fetch` raises.
        """
        if loaded := self._loaded.get(digest):
            self._loaded.move_to_end(digest)
            return loaded
        loading = self._loading.get(digest) or self._start(digest)
        # Unlike awaiting the task, this leaves it running when one of those who wait for it is cancelled.
        done, _ = await asyncio.wait({loading}, timeout=wait_s)
        if not done:
            raise ManagerUnreachableError(
                f"The manager has not sent tokenizer {digest} within the deadline. The download goes on; retry."
            )
        return loading.result()

    def _start(self, digest: str) -> asyncio.Task[LoadedTokenizer]:
        _check_digest(digest)
        loading = self._loading[digest] = asyncio.create_task(self._load(digest))
        loading.add_done_callback(lambda done: self._finish(digest, done))
        return loading

    def _finish(self, digest: str, loading: asyncio.Task[LoadedTokenizer]) -> None:
        del self._loading[digest]
        # Asking for the exception also tells asyncio that it was seen when nobody waits any more.
        if loading.cancelled() or loading.exception() is not None:
            return
        self._loaded[digest] = loading.result()
        if len(self._loaded) > self._limit:
            forgotten, _ = self._loaded.popitem(last=False)
            _log.info("tokenizer left memory", digest=forgotten)

    async def content(self, digest: str) -> bytes:
        """Return a verified file, such as a chat template. Raises as `get` does."""
        _check_digest(digest)
        content, _ = await self._content(digest)
        return content

    async def hold(self, file: NeededFile) -> None:
        """Bring a file here for requests to come: a tokenizer into memory, a chat template onto the disk."""
        if file.kind is Kind.TOKENIZER:
            await self.get(file.digest)
        else:
            await self.content(file.digest)

    async def _content(self, digest: str) -> tuple[bytes, str]:
        content = await asyncio.to_thread(self._disk.read, digest)
        if content is not None:
            return content, "disk"
        content = await self._fetch(digest)
        await asyncio.to_thread(check_content, digest, content)
        await asyncio.to_thread(self._disk.write, digest, content)
        return content, "manager"

    async def _load(self, digest: str) -> LoadedTokenizer:
        content, source = await self._content(digest)
        loaded = await asyncio.to_thread(load_tokenizer, digest, content)
        metrics.LOADS.labels(source).inc()
        _log.info("tokenizer loaded", digest=digest, source=source, vocabulary_size=loaded.vocabulary_size)
        return loaded


def _check_digest(digest: str) -> None:
    try:
        check_sha256(digest)
    except InvalidBundleError as error:
        raise InvalidInputError(error.message, field="tokenizer_digest") from None


def load_tokenizer(digest: str, content: bytes) -> LoadedTokenizer:
    """Parse a `tokenizer.json`. Raises InvalidBundleError, with the reason, when it cannot be used."""
    try:
        library = tokenizers.Tokenizer.from_buffer(content)
        library.no_padding()
        library.no_truncation()
        type_ids_of = frozenset(
            (pair, special)
            for pair in (False, True)
            for special in (False, True)
            if _has_type_ids(library, pair, special)
        )
    except Exception as error:  # the library raises bare Exception as well as ValueError
        raise InvalidBundleError(
            f"Blob {digest} is no tokenizer.json that can be used: {error}. Push the model with a repaired one.",
            field="tokenizer_digest",
        ) from error
    added = library.get_added_tokens_decoder()
    return LoadedTokenizer(
        digest=digest,
        library=library,
        vocabulary_size=max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        special_tokens=tuple(SpecialToken(token.content, id_) for id_, token in sorted(added.items()) if token.special),
        added_to_single=library.num_special_tokens_to_add(is_pair=False),
        added_to_pair=library.num_special_tokens_to_add(is_pair=True),
        type_ids_of=type_ids_of,
        spellings=spellings(library),
    )


def _has_type_ids(library: tokenizers.Tokenizer, pair: bool, special: bool) -> bool:
    """Templates give each half and each special token one type id, so one short text shows them all."""
    probe = library.encode(_PROBE, _PROBE if pair else None, add_special_tokens=special)
    shown = {sequence for sequence in probe.sequence_ids if sequence is not None}
    return any(probe.type_ids) or len(shown) < 1 + pair
