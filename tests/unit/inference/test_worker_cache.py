import asyncio
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import graphs
from harness.small_tokenizers import digest_of
from modelfleet.bundle.bundle import BundleFile
from modelfleet.bundle.manifest import Task
from modelfleet.inference.assignment import AssignedVersion, Assignment, Route, VersionKey, WeightedVersion
from modelfleet.inference.cache import Cache
from modelfleet.runtime.errors import DigestMismatchError, ManagerUnreachableError

CONTENT = bytes(range(256)) * 20
FILE = BundleFile("model.onnx", digest_of(CONTENT), len(CONTENT))
SAMPLE = graphs.text_bundle(graphs.embedder(), Task.EMBED)
ASSIGNMENT = Assignment(
    7,
    (AssignedVersion(VersionKey("m", 1), SAMPLE.bundle),),
    (Route("m", "stable", (WeightedVersion(1, 1),)),),
)


class Source:
    """Bytes to download; `cut` ends the first download after that many bytes, as when the manager dies."""

    def __init__(self, content: bytes = CONTENT, cut: int | None = None) -> None:
        self.content = content
        self.cut = cut
        self.offsets: list[int] = []

    async def download(self, _sha256: str, offset: int) -> AsyncIterator[bytes]:
        self.offsets.append(offset)
        cut, self.cut = self.cut, None
        for start in range(offset, len(self.content), 100):
            if cut is not None and start >= cut:
                raise ManagerUnreachableError("gone")
            await asyncio.sleep(0)
            yield self.content[start : start + 100]


def blob(root: Path, file: BundleFile = FILE) -> Path:
    return root / "blobs" / file.sha256


async def filled(root: Path) -> Cache:
    cache = Cache(root)
    for file in SAMPLE.bundle.files:
        await cache.fetch(file, SAMPLE.download)
    return cache


async def test_a_blob_is_downloaded_once(tmp_path: Path) -> None:
    cache, source = Cache(tmp_path), Source()
    await cache.fetch(FILE, source.download)
    await cache.fetch(FILE, source.download)
    assert blob(tmp_path).read_bytes() == CONTENT
    assert source.offsets == [0]


async def test_a_download_that_was_cut_short_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = Source(cut=1000)
    with pytest.raises(ManagerUnreachableError):
        await Cache(tmp_path).fetch(FILE, source.download)
    assert not blob(tmp_path).exists()
    await Cache(tmp_path).fetch(FILE, source.download)  # after a restart, too
    assert source.offsets == [0, 1000]
    assert blob(tmp_path).read_bytes() == CONTENT


async def test_versions_that_need_a_blob_at_once_share_its_download(tmp_path: Path) -> None:
    cache, source = Cache(tmp_path), Source()
    await asyncio.gather(*(cache.fetch(FILE, source.download) for _ in range(3)))
    assert source.offsets == [0]
    assert blob(tmp_path).read_bytes() == CONTENT


async def test_few_blobs_are_downloaded_at_once(tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(10)]
    files = {digest_of(content): content for content in contents}
    under_way: set[str] = set()
    most = 0

    async def download(sha256: str, _offset: int) -> AsyncIterator[bytes]:
        nonlocal most
        under_way.add(sha256)
        most = max(most, len(under_way))
        for byte in files[sha256]:
            await asyncio.sleep(0)
            yield bytes([byte])
        under_way.remove(sha256)

    cache = Cache(tmp_path)
    await asyncio.gather(*(cache.fetch(BundleFile("x", digest, 1000), download) for digest in files))

    assert most == 3
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == set(files)


async def test_the_next_in_line_downloads_when_the_first_fails(tmp_path: Path) -> None:
    cache, source = Cache(tmp_path), Source(cut=1000)
    first, second = await asyncio.gather(
        *(cache.fetch(FILE, source.download) for _ in range(2)), return_exceptions=True
    )
    assert isinstance(first, ManagerUnreachableError)
    assert second is None
    assert blob(tmp_path).read_bytes() == CONTENT


async def test_bytes_of_another_hash_are_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(DigestMismatchError, match=rf"'model.onnx' has the SHA-256 \w+ and should have {FILE.sha256}"):
        await cache.fetch(FILE, Source(b"something else").download)
    assert list((tmp_path / "blobs").iterdir()) == []
    await cache.fetch(FILE, Source().download)
    assert blob(tmp_path).read_bytes() == CONTENT


async def test_a_partial_file_longer_than_its_blob_is_started_anew(tmp_path: Path) -> None:
    cache, source = Cache(tmp_path), Source()
    blob(tmp_path).with_name(f"{FILE.sha256}.partial").write_bytes(CONTENT * 2)
    await cache.fetch(FILE, source.download)
    assert source.offsets == [0]
    assert blob(tmp_path).read_bytes() == CONTENT


async def test_a_bundle_is_a_directory_of_hard_links_to_blobs(tmp_path: Path) -> None:
    cache = await filled(tmp_path)
    directory = cache.materialize(SAMPLE.bundle)
    assert cache.materialize(SAMPLE.bundle) == directory
    for file in SAMPLE.bundle.files:
        assert (directory / file.path).samefile(blob(tmp_path, file))
        assert not (directory / file.path).is_symlink()


async def test_a_blob_that_went_bad_on_disk_is_deleted_and_heals_with_the_next_download(tmp_path: Path) -> None:
    cache = await filled(tmp_path)
    cache.materialize(SAMPLE.bundle)
    bad = SAMPLE.bundle.files[0]
    with blob(tmp_path, bad).open("r+b") as file:  # as a disk does: in the blob and in all links to it
        file.write(b"rotten")
    with pytest.raises(DigestMismatchError):
        cache.materialize(SAMPLE.bundle)
    assert not blob(tmp_path, bad).exists()
    await cache.fetch(bad, SAMPLE.download)
    directory = cache.materialize(SAMPLE.bundle)
    assert (directory / bad.path).read_bytes() == SAMPLE.contents[bad.sha256]


async def test_what_was_left_half_built_does_not_matter(tmp_path: Path) -> None:
    cache = await filled(tmp_path)
    building = tmp_path / "bundles" / f"{SAMPLE.bundle.digest}.building"
    building.mkdir()
    (building / "model.onnx").write_text("half")
    directory = cache.materialize(SAMPLE.bundle)
    assert sorted(path.name for path in directory.iterdir()) == ["model.onnx", "tokenizer.json"]


def test_deaths_in_an_attempt_are_counted_until_one_is_survived(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    dies = f"""
import os, pickle, signal, sys
from pathlib import Path
from modelfleet.inference.cache import Cache
with Cache(Path({str(tmp_path)!r})).attempt(pickle.load(sys.stdin.buffer)):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        died = subprocess.run([sys.executable, "-c", dies], input=pickle.dumps(SAMPLE.bundle), check=False)
        assert died.returncode == -signal.SIGKILL

    with pytest.raises(OSError, match="disk full"), cache.attempt(SAMPLE.bundle) as deaths:
        raise OSError("disk full")

    assert deaths == 2
    with cache.attempt(SAMPLE.bundle) as deaths:
        assert deaths == 0


def test_an_assignment_is_kept_for_the_next_start(tmp_path: Path) -> None:
    Cache(tmp_path).save_assignment(ASSIGNMENT)
    assert Cache(tmp_path).last_assignment() == ASSIGNMENT


def test_without_a_kept_assignment_there_is_none(tmp_path: Path) -> None:
    assert Cache(tmp_path).last_assignment() is None


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        ASSIGNMENT.to_json().encode()[:-20],
        ASSIGNMENT.to_json().replace("versions", "models").encode(),
        ASSIGNMENT.to_json().replace('\\"task\\":\\"embed\\"', '\\"task\\":\\"sing\\"').encode(),
        ASSIGNMENT.to_json().replace(SAMPLE.bundle.files[0].sha256, "no digest").encode(),
    ],
)
def test_a_kept_assignment_that_cannot_be_read_is_ignored(tmp_path: Path, kept: bytes) -> None:
    assert kept != ASSIGNMENT.to_json().encode()
    cache = Cache(tmp_path)
    (tmp_path / "assignment.json").write_bytes(kept)
    assert cache.last_assignment() is None
