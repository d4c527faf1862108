import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from harness.blobs import digest, whole, write
from harness.bucket import Bucket, name
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.garbage import Collected, GarbageCollector
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow
from modelfleet.manager.uploads import Chunk, Uploads
from modelfleet.runtime.errors import InvalidInputError, StateConflictError, StorageUnreachableError
from obstore.exceptions import PermissionDeniedError
from sqlalchemy import update

HOUR = 3600


@pytest.fixture
def collector(database: Database, store: BlobStore) -> GarbageCollector:
    return GarbageCollector(database, store, grace_s=HOUR)


def bundle(*contents: bytes) -> Bundle:
    files = [BundleFile(f"{index}.bin", digest(content), len(content)) for index, content in enumerate(contents)]
    return Bundle((BundleFile("model.onnx", files[0].sha256, files[0].size), *files[1:]), MANIFEST)


MANIFEST = Manifest(task=Task.TENSOR, model="model.onnx")


def make_older(database: Database, *digests: str) -> None:
    """Let everything that happened to blobs have happened two hours earlier."""
    earlier = datetime.now(UTC) - timedelta(hours=2)
    with database.writing() as session:
        chosen = update(BlobRow).where(BlobRow.sha256.in_(digests))
        session.execute(chosen.values(create_time=earlier))
        session.execute(chosen.where(BlobRow.last_used_time.is_not(None)).values(last_used_time=earlier))


async def test_a_collection_that_fails_in_whatever_way_is_not_the_last(
    collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = asyncio.Event()
    loop = asyncio.get_running_loop()
    outcomes = iter([PermissionDeniedError("not for you"), KeyError("sha256")])

    def collect() -> Collected:
        if error := next(outcomes, None):
            raise error
        loop.call_soon_threadsafe(collected.set)
        return Collected()

    monkeypatch.setattr(collector, "collect", collect)
    collecting = asyncio.create_task(collector.run(interval_s=0.01))

    async with asyncio.timeout(5):
        await collected.wait()
    collecting.cancel()


async def test_blob_that_no_version_has_goes_after_the_grace_period(
    database: Database, blobs: Blobs, bucket: Bucket, collector: GarbageCollector
) -> None:
    old, young = await write(blobs, b"old"), await write(blobs, b"young")
    make_older(database, old)

    collected = collector.collect()

    assert [blob.sha256 for blob in collected.blobs] == [old]
    assert (collected.blob_count, collected.bytes) == (1, 3)
    assert await blobs.find_missing([old, young]) == [old]
    assert bucket.names() == {name(young)}


async def test_blob_stays_while_one_version_has_it_and_its_grace_begins_when_the_last_is_deleted(
    database: Database, blobs: Blobs, registry: Registry, collector: GarbageCollector
) -> None:
    shared, others = b"shared", (b"1", b"2")
    for content in (shared, *others):
        await write(blobs, content)
    for other in others:
        registry.register("m", bundle(other, shared), None)
    make_older(database, *map(digest, (shared, *others)))

    registry.delete_model_version("m", 1)
    assert collector.collect().blob_count == 0
    make_older(database, digest(b"1"), digest(shared))
    assert [blob.sha256 for blob in collector.collect().blobs] == [digest(b"1")]

    registry.delete_model_version("m", 2)
    assert collector.collect().blob_count == 0
    make_older(database, digest(b"2"), digest(shared))
    assert {blob.sha256 for blob in collector.collect().blobs} == {digest(b"2"), digest(shared)}


async def test_push_that_was_told_that_a_blob_is_there_does_not_lose_it(
    database: Database, blobs: Blobs, registry: Registry, collector: GarbageCollector
) -> None:
    sha256 = await write(blobs, b"x")
    make_older(database, sha256)

    assert await blobs.find_missing([sha256]) == []
    assert collector.collect().blob_count == 0

    assert registry.register("m", bundle(b"x"), None).created


async def test_blob_that_is_sent_again_is_spared(database: Database, blobs: Blobs, collector: GarbageCollector) -> None:
    sha256 = await write(blobs, b"x")
    make_older(database, sha256)
    await write(blobs, b"x")
    assert collector.collect().blob_count == 0


async def test_dry_run_tells_what_a_run_would_delete_and_deletes_nothing(
    database: Database, blobs: Blobs, bucket: Bucket, collector: GarbageCollector
) -> None:
    digests = [await write(blobs, str(number).encode()) for number in range(3)]
    make_older(database, *digests)

    told = collector.collect(dry_run=True)

    assert len(bucket.names()) == 3
    assert await blobs.find_lost(digests) == []
    assert collector.collect() == told
    assert [blob.sha256 for blob in told.blobs] == sorted(digests)
    assert bucket.names() == set()


async def test_more_than_one_transaction_takes_is_deleted_all_the_same(
    database: Database, collector: GarbageCollector
) -> None:
    with database.writing() as session:
        for number in range(1234):
            session.add(BlobRow(sha256=f"{number:064x}", size=2, create_time=datetime.now(UTC)))

    told = collector.collect(dry_run=True, grace_s=0)
    done = collector.collect(grace_s=0)  # of rows whose bytes have gone already, as after a kill in between

    assert told == done
    assert (done.blob_count, done.bytes, len(done.blobs)) == (1234, 2468, 1000)
    assert collector.collect(grace_s=0).blob_count == 0


def test_negative_grace_period_is_refused(collector: GarbageCollector) -> None:
    with pytest.raises(InvalidInputError, match=r"-1 s\. Give 0 or more"):
        collector.collect(grace_s=-1)


async def test_blob_that_comes_again_while_its_old_bytes_are_deleted_is_whole_or_told_to_be_lost(
    bucket: Bucket, database: Database, blobs: Blobs
) -> None:
    deleting, written = threading.Event(), threading.Event()

    class Slow(BlobStore):
        def delete(self, digests: Iterable[str]) -> None:
            deleting.set()
            written.wait(0.5)  # no writer comes to its end meanwhile
            super().delete(digests)

    await write(blobs, b"x")
    collector = GarbageCollector(database, Slow(bucket.url), grace_s=0)
    collecting = asyncio.create_task(asyncio.to_thread(collector.collect))
    await asyncio.to_thread(deleting.wait)

    with pytest.raises(StorageUnreachableError, match="Push again"):
        await write(blobs, b"x")
    written.set()
    await collecting

    assert await blobs.find_missing([digest(b"x")]) == [digest(b"x")]


async def test_pushes_beside_collections_without_any_grace_end_whole_or_are_told_to_push_again(
    blobs: Blobs, registry: Registry, collector: GarbageCollector
) -> None:
    uploads = Uploads(blobs, registry)
    shared = b"shared"

    async def push(number: int) -> bool:
        own = str(number).encode()
        missing = await blobs.find_missing([digest(own), digest(shared)])

        async def chunks() -> Callable[[], None]:
            for content in (own, shared):
                if digest(content) in missing:
                    yield Chunk(digest(content), content)

        try:
            done = await uploads.push("m", bundle(own, shared), None, chunks())
        except (StateConflictError, StorageUnreachableError):
            return False
        registered = done.model_version
        for file, content in zip(registered.files, (shared, own), strict=True):
            assert await whole(blobs, file.sha256) == content
        registry.delete_model_version("m", registered.model_version)
        return True

    stopping = False
    with ThreadPoolExecutor(1) as thread:

        def collect_on() -> int:
            total = 0
            while not stopping:
                total += collector.collect(grace_s=0).blob_count
            return total

        collecting = asyncio.wrap_future(thread.submit(collect_on))
        try:
            outcomes = [await asyncio.gather(*map(push, range(start, start + 4))) for start in range(0, 40, 4)]
        finally:
            stopping = True
        deleted = await collecting

    assert any(done for batch in outcomes for done in batch)
    assert deleted > 0
