import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.store.database import Database
from modelfleet.runtime.errors import BlobNotFoundError, DigestMismatchError, InvalidInputError

# The examples share a directory: blobs are named by their content, so they do not disturb one another.
shared_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
pieces_of_bytes = st.lists(st.binary(max_size=200), max_size=8)


@pytest.fixture
def blobs(tmp_path: Path, database: Database) -> Blobs:
    return Blobs(BlobStore((tmp_path / "blobs").as_uri()), database)


def stored(root: Path) -> list[Path]:
    return [path for path in (root / "blobs").rglob("*") if path.is_file()]


async def each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def whole(blobs: Blobs, sha256: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in blobs.read(sha256, offset)])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@shared_directory
@given(pieces_of_bytes, st.data())
async def test_blob_reads_back_from_any_offset_however_it_came(
    blobs: Blobs, pieces: list[bytes], data: st.DataObject
) -> None:
    content = b"".join(pieces)
    offset = data.draw(st.integers(0, len(content)))

    await blobs.write(digest(content), len(content), each(pieces))

    assert await whole(blobs, digest(content), offset) == content[offset:]
    assert await blobs.find_missing([digest(content)]) == []


@shared_directory
@given(pieces_of_bytes, st.binary(max_size=300))
async def test_nothing_is_kept_of_bytes_that_are_not_what_was_announced(
    tmp_path: Path, blobs: Blobs, pieces: list[bytes], other: bytes
) -> None:
    announced = digest(b"announced:" + other)
    before = stored(tmp_path)

    with pytest.raises((DigestMismatchError, InvalidInputError)):
        await blobs.write(announced, len(other), each(pieces))

    assert await blobs.find_missing([announced]) == [announced]
    assert stored(tmp_path) == before


async def test_nothing_is_kept_when_the_source_fails(tmp_path: Path, blobs: Blobs) -> None:
    async def breaks_off() -> AsyncIterator[bytes]:
        yield bytes(20 << 20)  # more than the writer holds in memory
        raise ConnectionResetError

    content = bytes(21 << 20)
    with pytest.raises(ConnectionResetError):
        await blobs.write(digest(content), len(content), breaks_off())

    assert stored(tmp_path) == []


async def test_nothing_is_kept_when_the_writing_task_is_cancelled(tmp_path: Path, blobs: Blobs) -> None:
    stuck = asyncio.Event()

    async def gets_stuck() -> AsyncIterator[bytes]:
        yield bytes(20 << 20)
        stuck.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(blobs.write("0" * 64, 21 << 20, gets_stuck()))
    await stuck.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing

    async with asyncio.timeout(10):
        while await asyncio.to_thread(stored, tmp_path):  # deleted by a thread of the store
            pass


async def test_bytes_without_a_row_are_not_a_blob(tmp_path: Path, blobs: Blobs) -> None:
    left = tmp_path / "blobs" / "sha256" / digest(b"x")[:2] / digest(b"x")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")  # as a power cut between rename and flush may leave it

    assert await blobs.find_missing([digest(b"x")]) == [digest(b"x")]
    with pytest.raises(BlobNotFoundError):
        await whole(blobs, digest(b"x"))
    await blobs.write(digest(b"x"), 1, each([b"x"]))
    assert await whole(blobs, digest(b"x")) == b"x"


async def test_blob_of_many_parts_is_whole(blobs: Blobs) -> None:
    content = os.urandom(35 << 20)
    pieces = (content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20))

    await blobs.write(digest(content), len(content), each(pieces))

    assert digest(await whole(blobs, digest(content))) == digest(content)


async def test_sweep_deletes_what_killed_writers_left_long_ago_and_nothing_else(tmp_path: Path, blobs: Blobs) -> None:
    await blobs.write(digest(b"x"), 1, each([b"x"]))
    (blob,) = stored(tmp_path)
    old, fresh = (blob.with_name(f"{blob.name}#{number}") for number in (1, 2))
    old.write_bytes(b"partial")
    fresh.write_bytes(b"partial")
    two_hours_ago = time.time() - 7200
    for path in (old, blob):
        os.utime(path, (two_hours_ago, two_hours_ago))

    BlobStore((tmp_path / "blobs").as_uri()).sweep()

    assert set(stored(tmp_path)) == {blob, fresh}
