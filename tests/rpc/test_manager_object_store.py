"""The manager over PostgreSQL and S3, and workers that read blobs straight from there."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from harness.bucket import Bucket, name
from harness.manager import Manager, push, running_manager, sha256
from harness.postgres import Postgres
from harness.s3 import S3
from harness.serving import serving
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import (
    ModelServiceServicer,
    add_ModelServiceServicer_to_server,
)
from modelfleet.bundle.bundle import BundleFile
from modelfleet.client.channel import open_async_channel
from modelfleet.inference.cache import Cache
from modelfleet.inference.manager_client import ManagerClient
from modelfleet.runtime.errors import BlobNotFoundError, DigestMismatchError
from prometheus_client import REGISTRY

pytestmark = pytest.mark.slow
MIB = 1 << 20
GRAPH = os.urandom(20 * MIB + 7)


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    return s3.new_bucket()


@pytest.fixture
async def manager(tmp_path: Path, postgres: Postgres, bucket: Bucket) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path / "data", database_url=postgres.new_url(), blob_url=bucket.url) as manager:
        await push(manager, "pii", {"model.onnx": GRAPH}, alias="stable")
        yield manager
    assert not (tmp_path / "data").exists()  # nothing on the manager's own disk


@pytest.fixture
async def worker(manager: Manager) -> AsyncIterator[ManagerClient]:
    async with open_async_channel(manager.address, attempts=1) as channel:
        yield ManagerClient(channel, worker="w", pool="p")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def graph_file(content: bytes = GRAPH) -> BundleFile:
    return BundleFile("model.onnx", sha256(content), len(content))


def cached(tmp_path: Path, suffix: str = "") -> Path:
    return tmp_path / "cache" / "blobs" / (sha256(GRAPH) + suffix)


def bytes_sent_by_the_manager() -> float:
    return REGISTRY.get_sample_value("modelfleet_manager_sent_bytes_total") or 0


async def test_workers_that_start_at_once_read_from_the_store_and_not_from_the_manager(
    tmp_path: Path, worker: ManagerClient
) -> None:
    before = bytes_sent_by_the_manager()
    caches = [Cache(tmp_path / f"cache{number}") for number in range(4)]

    await asyncio.gather(*(one.fetch(graph_file(), worker.download) for one in caches))

    assert bytes_sent_by_the_manager() == before
    for number in range(4):
        assert (tmp_path / f"cache{number}" / "blobs" / sha256(GRAPH)).read_bytes() == GRAPH


@pytest.mark.parametrize("have", [1, 5 * MIB + 3, len(GRAPH)])
async def test_download_that_was_cut_short_continues_at_the_store_where_it_stopped(
    tmp_path: Path, worker: ManagerClient, cache: Cache, have: int
) -> None:
    before = bytes_sent_by_the_manager()
    cached(tmp_path, ".partial").write_bytes(GRAPH[:have])

    pieces = [piece async for piece in worker.download(sha256(GRAPH), have)]
    await cache.fetch(graph_file(), worker.download)

    assert b"".join(pieces) == GRAPH[have:]
    assert cached(tmp_path).read_bytes() == GRAPH
    assert bytes_sent_by_the_manager() == before


async def test_bytes_that_the_store_has_wrong_are_not_kept(
    tmp_path: Path, bucket: Bucket, worker: ManagerClient, cache: Cache
) -> None:
    bucket.put(sha256(GRAPH), GRAPH[:-1] + b"!")
    with pytest.raises(DigestMismatchError, match=r"'model\.onnx' has the SHA-256"):
        await cache.fetch(graph_file(), worker.download)
    assert not cached(tmp_path).exists()


async def test_blob_that_the_store_has_lost_is_not_found(
    bucket: Bucket, manager: Manager, worker: ManagerClient, cache: Cache
) -> None:
    bucket.delete(sha256(GRAPH))
    with pytest.raises(BlobNotFoundError, match="Push the bundle again"):
        await cache.fetch(graph_file(), worker.download)

    await push(manager, "pii", {"model.onnx": GRAPH})

    await cache.fetch(graph_file(), worker.download)
    assert bucket.names() == {name(sha256(GRAPH))}


async def test_url_is_good_for_its_blob_alone(bucket: Bucket, manager: Manager) -> None:
    bucket.put("0" * 64, b"another's")
    url = (await manager.models.GetBlobUrl(pb.GetBlobUrlRequest(sha256=sha256(GRAPH)))).url

    def read(url: str) -> bytes:
        with urlopen(url) as response:
            return response.read()

    assert await asyncio.to_thread(read, url) == GRAPH
    for forged in (url.replace(name(sha256(GRAPH)), name("0" * 64)), url.partition("?")[0]):
        with pytest.raises(HTTPError) as caught:
            await asyncio.to_thread(read, forged)
        assert caught.value.code == 403
        caught.value.close()


class Elsewhere(ModelServiceServicer):
    """A manager that has one blob, and names a place for it that workers cannot reach."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.offsets: list[int] = []

    async def GetBlobUrl(self, _request: pb.GetBlobUrlRequest, _context: object) -> pb.GetBlobUrlResponse:  # noqa: N802  as in the contract
        return pb.GetBlobUrlResponse(url=self.url)

    async def DownloadBlob(  # noqa: N802  as in the contract
        self, request: pb.DownloadBlobRequest, _context: object
    ) -> AsyncIterator[pb.DownloadBlobResponse]:
        self.offsets.append(request.offset)
        yield pb.DownloadBlobResponse(data=b"content"[request.offset :])


async def cut_short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ncont")
    writer.close()


async def test_worker_asks_the_manager_for_what_the_store_does_not_give(tmp_path: Path) -> None:
    async with await asyncio.start_server(cut_short, "127.0.0.1", 0) as store:
        cutting = f"http://127.0.0.1:{store.sockets[0].getsockname()[1]}/x"
        for url, offset in (("http://127.0.0.1:1/x", 0), ("s3://bucket/x", 0), (cutting, 4), ("", 0)):
            manager = Elsewhere(url)
            async with (
                serving(lambda server, manager=manager: add_ModelServiceServicer_to_server(manager, server)) as address,
                open_async_channel(address, attempts=1) as channel,
            ):
                cache = Cache(tmp_path / f"cache-{url.replace('/', '-')}")
                worker = ManagerClient(channel, worker="w", pool="p")
                await cache.fetch(graph_file(b"content"), worker.download)
            assert manager.offsets == [offset]
