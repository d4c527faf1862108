from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.blobs import digest, whole, write
from harness.bucket import Bucket, name
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.manager import blob_check
from modelfleet.manager.blob_check import BlobCheck, CheckedPage, Problem, ProblemKind
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database
from modelfleet.runtime.errors import InvalidInputError

CONTENTS = [f"content {number}".encode() for number in range(12)]


@pytest.fixture
def check(database: Database, store: BlobStore) -> BlobCheck:
    return BlobCheck(database, store, grace_s=0)


async def problems(check: BlobCheck, *, repair: bool = False) -> dict[str, Problem]:
    return {problem.sha256: problem async for page in pages(check, repair=repair) for problem in page.problems}


async def pages(check: BlobCheck, *, repair: bool = False) -> AsyncIterator[CheckedPage]:
    token = ""
    while True:
        page = await check.check(token, repair=repair)
        yield page
        if not (token := page.next_token):
            return


def register(registry: Registry, model: str, content: bytes) -> None:
    file = BundleFile("model.onnx", digest(content), len(content))
    registry.register(model, Bundle((file,), Manifest(task=Task.TENSOR, model="model.onnx")), None)


async def test_sound_blobs_are_all_read_and_nothing_is_found(blobs: Blobs, check: BlobCheck) -> None:
    for content in (*CONTENTS, b""):
        await write(blobs, content)

    checked = [page async for page in pages(check)]

    assert [page.problems for page in checked if page.problems] == []
    assert sum(page.blobs for page in checked) == 13
    assert sum(page.bytes for page in checked) == sum(map(len, CONTENTS))


@pytest.mark.parametrize("limit", ["_PAGE_BYTES", "_PAGE_S"])
async def test_pages_of_any_size_hold_every_blob_once(
    blobs: Blobs, check: BlobCheck, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    for content in CONTENTS:
        await write(blobs, content)
    monkeypatch.setattr(blob_check, limit, 1e-9)

    checked = [page async for page in pages(check)]

    assert len(checked) > 1
    assert sum(page.blobs for page in checked) == len(CONTENTS)
    assert sum(page.bytes for page in checked) == sum(map(len, CONTENTS))


async def test_lost_cut_changed_and_stray_bytes_are_named_with_the_versions_that_have_them(
    bucket: Bucket, blobs: Blobs, registry: Registry, check: BlobCheck
) -> None:
    lost, cut, changed, sound = CONTENTS[:4]
    for content in (lost, cut, changed, sound):
        await write(blobs, content)
    for model, content in (("a", changed), ("b", changed), ("a", lost)):
        register(registry, model, content)
    bucket.delete(digest(lost))
    bucket.put(digest(cut), cut[:-1])
    bucket.put(digest(changed), changed[::-1])
    bucket.put(digest(b"stray"), b"stray")

    found = await problems(check)

    assert found == {
        digest(lost): Problem(ProblemKind.MISSING, digest(lost), "its bytes are gone from the store", ("a@2",)),
        digest(cut): Problem(ProblemKind.CORRUPT, digest(cut), "8 bytes are stored of 9"),
        digest(changed): Problem(
            ProblemKind.CORRUPT, digest(changed), f"its bytes hash to {digest(changed[::-1])[:12]}…", ("a@1", "b@1")
        ),
        digest(b"stray"): Problem(ProblemKind.ORPHAN, digest(b"stray"), "bytes that are registered as no blob"),
    }
    assert await problems(check) == found  # a look changes nothing


async def test_repair_makes_what_is_wrong_missing_so_that_the_next_push_heals_it(
    bucket: Bucket, blobs: Blobs, registry: Registry, check: BlobCheck
) -> None:
    lost, changed, unused = CONTENTS[:3]
    for content in (lost, changed, unused):
        await write(blobs, content)
    register(registry, "a", lost)
    register(registry, "a", changed)
    for content in (changed, unused):
        bucket.put(digest(content), content[::-1])
    bucket.delete(digest(lost))
    bucket.put(digest(b"stray"), b"stray")

    repaired = await problems(check, repair=True)

    assert {sha256: problem.repaired for sha256, problem in repaired.items()} == {
        digest(lost): False,  # its version still needs it
        digest(changed): True,
        digest(unused): True,
        digest(b"stray"): True,
    }
    assert bucket.names() == set()
    assert await blobs.find_missing([digest(lost), digest(changed)]) == [digest(lost), digest(changed)]
    assert {problem.kind for problem in (await problems(check)).values()} == {ProblemKind.MISSING}

    await write(blobs, lost)
    await write(blobs, changed)

    assert await problems(check) == {}
    assert await whole(blobs, digest(changed)) == changed
    assert bucket.names() == {name(digest(lost)), name(digest(changed))}


async def test_stray_bytes_that_may_be_about_to_be_registered_are_left_alone(
    bucket: Bucket, database: Database, store: BlobStore
) -> None:
    bucket.put(digest(b"stray"), b"stray")
    assert await problems(BlobCheck(database, store, grace_s=60), repair=True) == {}
    assert bucket.names() == {name(digest(b"stray"))}


@pytest.mark.parametrize("token", ["1", "fff", "zz", "AB", "-1"])
async def test_text_that_is_no_token_of_a_page_is_refused(tmp_path: Path, token: str) -> None:
    check = BlobCheck(Database(f"sqlite:///{tmp_path}/manager.db"), BlobStore(tmp_path.as_uri()), grace_s=0)
    with pytest.raises(InvalidInputError, match="next_page_token") as caught:
        await check.check(token, repair=False)
    assert caught.value.field == "page_token"
