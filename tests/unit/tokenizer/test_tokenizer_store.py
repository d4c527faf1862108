import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from harness.small_tokenizers import byte_bpe_json, digest_of, wordpiece_json
from modelfleet.runtime.errors import (
    DigestMismatchError,
    InvalidBundleError,
    InvalidInputError,
    ManagerUnreachableError,
    TokenizerNotFoundError,
)
from modelfleet.tokenizer.disk_cache import DiskCache
from modelfleet.tokenizer.tokenizers import TokenizerStore, load_tokenizer
from tokenizers import Tokenizer, models

WORDPIECE = digest_of(wordpiece_json())
BYTE_BPE = digest_of(byte_bpe_json())


class Source:
    """A manager that counts what is asked of it; it answers once `open` is set."""

    def __init__(self, blobs: dict[str, bytes] | None = None) -> None:
        self.blobs = {WORDPIECE: wordpiece_json(), BYTE_BPE: byte_bpe_json()} if blobs is None else blobs
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def fetch(self, digest: str) -> bytes:
        self.asked.append(digest)
        self.was_asked.set()
        await self.open.wait()
        if digest not in self.blobs:
            raise TokenizerNotFoundError(f"no {digest}")
        return self.blobs[digest]


def store(fetch: Callable[[str], Awaitable[bytes]], directory: Path, limit: int = 8, files: int = 8) -> TokenizerStore:
    return TokenizerStore(fetch, DiskCache(directory, files), limit)


async def test_concurrent_first_uses_share_one_load(tmp_path: Path) -> None:
    source = Source()
    tokenizers = store(source.fetch, tmp_path)

    loaded = await asyncio.gather(*[tokenizers.get(WORDPIECE) for _ in range(20)])

    assert source.asked == [WORDPIECE]
    assert len({id(tokenizer) for tokenizer in loaded}) == 1


async def test_a_caller_that_leaves_does_not_end_the_load_of_the_others(tmp_path: Path) -> None:
    source = Source()
    source.open.clear()
    tokenizers = store(source.fetch, tmp_path)
    leaving, staying = asyncio.create_task(tokenizers.get(WORDPIECE)), asyncio.create_task(tokenizers.get(WORDPIECE))
    await source.was_asked.wait()

    leaving.cancel()
    source.open.set()

    assert (await staying).digest == WORDPIECE
    assert source.asked == [WORDPIECE]


async def test_a_caller_waits_no_longer_than_its_deadline_and_a_retry_finds_the_load(tmp_path: Path) -> None:
    source = Source()
    source.open.clear()
    tokenizers = store(source.fetch, tmp_path)

    with pytest.raises(ManagerUnreachableError, match="within the deadline"):
        await tokenizers.get(WORDPIECE, wait_s=0.01)
    source.open.set()

    assert (await tokenizers.get(WORDPIECE)).digest == WORDPIECE
    assert source.asked == [WORDPIECE]


async def test_the_tokenizer_used_longest_ago_leaves_memory_and_comes_back_from_disk(tmp_path: Path) -> None:
    source = Source()
    tokenizers = store(source.fetch, tmp_path, limit=1)

    first = await tokenizers.get(WORDPIECE)
    await tokenizers.get(BYTE_BPE)
    again = await tokenizers.get(WORDPIECE)

    assert again is not first
    assert source.asked == [WORDPIECE, BYTE_BPE]


async def test_a_restart_needs_no_manager(tmp_path: Path) -> None:
    await store(Source().fetch, tmp_path).get(WORDPIECE)
    manager_without_blobs = Source({})

    loaded = await store(manager_without_blobs.fetch, tmp_path).get(WORDPIECE)

    assert loaded.digest == WORDPIECE
    assert manager_without_blobs.asked == []


async def test_a_file_damaged_on_disk_is_fetched_again(tmp_path: Path) -> None:
    source = Source()
    await store(source.fetch, tmp_path).get(WORDPIECE)
    (tmp_path / f"{WORDPIECE}.json").write_bytes(b"damaged")

    await store(source.fetch, tmp_path).get(WORDPIECE)

    assert source.asked == [WORDPIECE, WORDPIECE]
    assert (tmp_path / f"{WORDPIECE}.json").read_bytes() == wordpiece_json()


async def test_bytes_with_another_hash_are_refused_and_not_kept(tmp_path: Path) -> None:
    tokenizers = store(Source({WORDPIECE: byte_bpe_json()}).fetch, tmp_path)

    with pytest.raises(DigestMismatchError, match=BYTE_BPE):
        await tokenizers.get(WORDPIECE)
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_load_is_tried_again(tmp_path: Path) -> None:
    source = Source({})
    tokenizers = store(source.fetch, tmp_path)
    with pytest.raises(TokenizerNotFoundError):
        await tokenizers.get(WORDPIECE)

    source.blobs[WORDPIECE] = wordpiece_json()

    assert (await tokenizers.get(WORDPIECE)).digest == WORDPIECE


async def test_a_disk_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    not_a_directory = tmp_path / "file"
    not_a_directory.touch()

    assert (await store(Source().fetch, not_a_directory).get(WORDPIECE)).digest == WORDPIECE


async def test_the_disk_keeps_the_files_used_last(tmp_path: Path) -> None:
    tokenizers = store(Source().fetch, tmp_path, files=1)

    await tokenizers.get(WORDPIECE)
    await tokenizers.get(BYTE_BPE)

    assert [path.name for path in tmp_path.iterdir()] == [f"{BYTE_BPE}.json"]


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", "A" * 64, f"{'a' * 64}\n"])
async def test_what_is_no_digest_is_never_looked_for(tmp_path: Path, digest: str) -> None:
    source = Source()

    with pytest.raises(InvalidInputError, match="is no SHA-256") as raised:
        await store(source.fetch, tmp_path).get(digest)
    assert raised.value.field == "tokenizer_digest"
    assert source.asked == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"not json", b'{"version": "9.9", "model": {}}'])
def test_a_file_that_is_no_tokenizer_is_an_invalid_bundle_with_the_reason(content: bytes) -> None:
    with pytest.raises(InvalidBundleError, match=r"is no tokenizer.json that can be used: .+\. Push"):
        load_tokenizer(digest_of(content), content)


def test_a_loaded_tokenizer_is_described() -> None:
    loaded = load_tokenizer(WORDPIECE, wordpiece_json())

    assert [(token.content, token.id) for token in loaded.special_tokens] == [
        ("[PAD]", 0),
        ("[UNK]", 1),
        ("[CLS]", 2),
        ("[SEP]", 3),
    ]
    assert (loaded.added_to_single, loaded.added_to_pair) == (2, 3)
    assert loaded.vocabulary_size == loaded.library.get_vocab_size()


def test_the_vocabulary_reaches_to_the_highest_id_also_over_gaps() -> None:
    content = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 7}, unk_token="[UNK]")).to_str().encode()

    assert load_tokenizer(digest_of(content), content).vocabulary_size == 8
