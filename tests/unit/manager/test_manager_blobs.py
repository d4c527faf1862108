import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.blobs import digest, each, whole, write
from harness.bucket import Bucket
from harness.s3 import S3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.store.database import Database
from modelfleet.runtime.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    InvalidInputError,
    StorageUnreachableError,
)

# The examples share a directory: blobs are named by their content, so they do not disturb one another.
shared_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
pieces_of_bytes = st.lists(st.binary(max_size=200), max_size=8)


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
    bucket: Bucket, blobs: Blobs, pieces: list[bytes], other: bytes
) -> None:
    announced = digest(b"announced:" + other)
    before = bucket.names()

    with pytest.raises((DigestMismatchError, InvalidInputError)):
        await blobs.write(announced, len(other), each(pieces))

    assert await blobs.find_missing([announced]) == [announced]
    assert bucket.names() == before


async def test_nothing_is_kept_when_the_source_fails(bucket: Bucket, blobs: Blobs) -> None:
    async def breaks_off() -> AsyncIterator[bytes]:
        yield bytes(20 << 20)  # more than the writer holds in memory
        raise ConnectionResetError

    content = bytes(21 << 20)
    with pytest.raises(ConnectionResetError):
        await blobs.write(digest(content), len(content), breaks_off())

    assert bucket.names() == set()


async def test_nothing_is_kept_when_the_writing_task_is_cancelled(bucket: Bucket, blobs: Blobs) -> None:
    stuck = asyncio.Event()

    async def gets_stuck() -> AsyncIterator[bytes]:
        yield bytes(20 << 20)
        stuck.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(blobs.write("0" * 64, 21 << 20, gets_stuck()))
    async with asyncio.timeout(10):
        await stuck.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing

    async with asyncio.timeout(10):
        while await asyncio.to_thread(bucket.names):  # deleted by a thread of the store
            pass


async def test_bytes_without_a_row_are_not_a_blob(bucket: Bucket, blobs: Blobs) -> None:
    bucket.put(digest(b"x"), b"half of it")  # as a power cut between rename and flush may leave it

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


async def test_sweep_deletes_what_killed_writers_left_long_ago_and_nothing_else(tmp_path: Path) -> None:
    store = BlobStore(tmp_path.as_uri())
    async with store.writing(digest(b"x")) as write_piece:
        await write_piece(b"x")
    blob = tmp_path / "sha256" / digest(b"x")[:2] / digest(b"x")
    old, fresh = (blob.with_name(f"{blob.name}#{number}") for number in (1, 2))
    old.write_bytes(b"partial")
    fresh.write_bytes(b"partial")
    two_hours_ago = time.time() - 7200
    for path in (old, blob):
        os.utime(path, (two_hours_ago, two_hours_ago))

    store.sweep()

    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {blob, fresh}


async def test_bytes_that_are_gone_make_a_blob_missing_until_it_is_stored_again(bucket: Bucket, blobs: Blobs) -> None:
    sha256 = await write(blobs, b"x")
    bucket.delete(sha256)

    assert await blobs.find_missing([sha256]) == [sha256]
    with pytest.raises(BlobNotFoundError, match="bytes are gone"):
        await whole(blobs, sha256)
    await write(blobs, b"x")

    assert await blobs.find_missing([sha256]) == []
    assert await whole(blobs, sha256) == b"x"


async def test_bytes_that_were_cut_make_a_blob_missing(bucket: Bucket, blobs: Blobs) -> None:
    sha256 = await write(blobs, b"xyz")
    bucket.put(sha256, b"xy")
    assert await blobs.find_missing([sha256]) == [sha256]


async def test_bytes_that_are_deleted_before_they_are_registered_are_no_blob(
    bucket: Bucket, database: Database
) -> None:
    class Collected(BlobStore):
        def settle(self, sha256: str) -> None:
            super().settle(sha256)
            self.delete([sha256])  # as another manager's repair of orphans might

    blobs = Blobs(Collected(bucket.url), database)
    with pytest.raises(StorageUnreachableError, match="Push again"):
        await write(blobs, b"x")
    assert await blobs.find_missing([digest(b"x")]) == [digest(b"x")]


async def test_store_that_cannot_be_reached_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nobody = S3("http://127.0.0.1:1")
    for name, value in nobody.environment.items():
        monkeypatch.setenv(name, value)
    store = BlobStore(nobody.new_bucket().url, retries=0)
    database = Database(f"sqlite:///{tmp_path}/manager.db")
    database.migrate()

    for content in (b"x", bytes(9 << 20)):  # in one part and in several
        with pytest.raises(StorageUnreachableError, match="does not answer"):
            await write(Blobs(store, database), content)
    with pytest.raises(StorageUnreachableError):
        store.stat(digest(b"x"))
    database.close()
