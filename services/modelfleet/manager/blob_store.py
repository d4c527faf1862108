"""The place of the blobs' bytes, each under its digest: a directory, or a bucket of S3, GCS or Azure."""

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url

from modelfleet.runtime.errors import ModelfleetError, StorageFullError, StorageUnreachableError

if TYPE_CHECKING:  # obstore has it in its hints only
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

PIECE_BYTES = 1 << 20
# A writer holds up to this many parts in memory. S3 takes at most 10,000 parts of at least 5 MiB.
_PART_BYTES = 8 << 20
_PARTS = 4
_ASKED_AT_ONCE = 32
_ABANDONED_S = 3600  # another manager may be writing what is younger

# A blob may be large, but its bytes may not stall. An endpoint of plain HTTP is meant as it is written.
_CONNECTION: "ClientConfig" = {"timeout": "1 day", "read_timeout": "30s", "allow_http": True}
_RETRIES = 5
_RETRY_S = 30
# What is asked within a transaction, while every other writer waits, and workers that report among them.
_BRIEF_CONNECTION: "ClientConfig" = {"timeout": "4s", "allow_http": True}
_BRIEF_RETRIES = 1

_URL = re.compile(r"(s3|gs|az)://.|file:///")
_NAME = re.compile(r"sha256/(?P<start>[0-9a-f]{2})/(?P<sha256>(?P=start)[0-9a-f]{62})")
# obstore gives no codes: the numbers of ENOSPC and EDQUOT, and what stores answer when a quota is used up.
_FULL = re.compile(r"\(os error (28|122)\)|QuotaExceeded|StorageFull|507 Insufficient Storage")
_REFUSED = re.compile(
    r"lacked (the necessary privileges|valid authentication)|40[13] (Unauthorized|Forbidden)|NoSuchBucket"
)
_FAILED = re.compile(r"Generic (?!LocalFileSystem)\w+ error")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """An object that has the name of a blob, whatever its content. `modified` is in whole seconds."""

    sha256: str
    size: int
    modified: datetime


def check_blob_url(url: str) -> None:
    """Raise ValueError unless blobs can be kept at this URL."""
    if not _URL.match(url):
        raise ValueError("give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///PATH")


class BlobStore:
    """
    Bytes by digest. Nothing is seen under a digest before it was written to its end.

    Everything raises StorageFullError when there is no room, and StorageUnreachableError when the store does not
    answer; what only reads never raises the former.
    """

    def __init__(self, url: str, *, retries: int = _RETRIES) -> None:
        """Open the place at a URL: `file:`, whose directory is made when missing, `s3:`, `gs:`, `az:`."""
        if url.startswith("file:"):
            self._store: ObjectStore = from_url(url, mkdir=True, automatic_cleanup=True)
            self._brief: ObjectStore = self._store
        else:
            retrying: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=_RETRY_S)}
            self._store = from_url(url, client_options=_CONNECTION, retry_config=retrying)
            briefly: RetryConfig = {"max_retries": _BRIEF_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)}
            self._brief = from_url(url, client_options=_BRIEF_CONNECTION, retry_config=briefly)

    @asynccontextmanager
    async def writing(self, sha256: str) -> AsyncIterator[Callable[[bytes], Any]]:
        """Give what writes the next bytes, awaited. They are kept when the block ends, and dropped when it raises."""
        with _explained():
            async with obstore.open_writer_async(
                self._store, _path(sha256), buffer_size=_PART_BYTES, max_concurrency=_PARTS
            ) as writer:
                yield writer.write

    async def read(self, sha256: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `offset` on, at most 1 MiB at a time. Raises FileNotFoundError."""
        with _explained():
            # An empty object has no range at all.
            options: GetOptions = {"range": {"offset": offset}} if offset else {}
            stored = await obstore.get_async(self._store, _path(sha256), options=options)
            async for buffer in stored.stream(min_chunk_size=PIECE_BYTES):
                for start in range(0, len(buffer), PIECE_BYTES):
                    yield bytes(buffer[start : start + PIECE_BYTES])

    async def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes in bytes of those of `digests` that are there."""
        at_once = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(sha256: str) -> tuple[str, int | None]:
            async with at_once:
                return sha256, await self._size(sha256)

        found = await asyncio.gather(*map(ask, dict.fromkeys(digests)))
        return {sha256: size for sha256, size in found if size is not None}

    def stat(self, sha256: str) -> StoredBytes | None:
        """Return what is stored under a digest. Blocking, but not for long."""
        with _explained(), suppress(FileNotFoundError):
            found = obstore.head(self._brief, _path(sha256))
            return _stored(sha256, found)
        return None

    def listed(self, start: str) -> Iterator[StoredBytes]:
        """Yield what is stored under the digests that begin with two given digits. Blocking."""
        with _explained():
            for chunk in obstore.list(self._store, f"sha256/{start}"):
                for found in chunk:
                    if name := _NAME.fullmatch(found["path"]):  # partial files have other names
                        yield _stored(name["sha256"], found)

    def delete(self, digests: Iterable[str]) -> None:
        """Delete those of `digests` that are there. Blocking, but not for long."""
        paths = [_path(sha256) for sha256 in digests]
        with _explained():
            if not isinstance(self._brief, LocalStore):
                obstore.delete(self._brief, paths)
                return
            for path in paths:
                with suppress(FileNotFoundError):
                    obstore.delete(self._brief, path)

    async def signed_url(self, sha256: str, lifetime: timedelta) -> str:
        """Return a URL from which anyone may read a blob for a while; empty where the store has none to give."""
        if not isinstance(self._store, S3Store | GCSStore | AzureStore):
            return ""
        with _explained():
            return await obstore.sign_async(self._store, "GET", _path(sha256), lifetime)

    def settle(self, sha256: str) -> None:
        """Have the name of a written blob outlive a power cut. Blocking."""
        if root := self._root:
            # obstore renames without fsync: the name could stand for no bytes afterwards. The directories' entries too.
            path = root / _path(sha256)
            for name in (path, path.parent, path.parent.parent):
                with suppress(FileNotFoundError):  # deleted since: whoever records the blob looks
                    _flush(name)

    def sweep(self) -> None:
        """
        Delete what killed writers left on local disk. Blocking.

        Object stores do this by themselves, given a lifecycle rule for incomplete multipart uploads.
        """
        if root := self._root:
            for leftover in root.glob("sha256/*/*#*"):  # obstore's names for files that are being written
                with suppress(FileNotFoundError):  # another manager sweeps too
                    if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                        leftover.unlink()

    @property
    def _root(self) -> Path | None:
        return self._store.prefix if isinstance(self._store, LocalStore) else None

    async def _size(self, sha256: str) -> int | None:
        with _explained(), suppress(FileNotFoundError):
            return (await obstore.head_async(self._store, _path(sha256)))["size"]
        return None


def _stored(sha256: str, meta: "ObjectMeta") -> StoredBytes:
    # Some stores give fractions in lists and none for a single object.
    return StoredBytes(sha256, meta["size"], meta["last_modified"].replace(microsecond=0))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _path(sha256: str) -> str:
    return f"sha256/{sha256[:2]}/{sha256}"


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:  # a writer's come as OSError
        explained = _explanation(str(error))
        if explained is None:
            raise
        _log.warning("blob store failed", error=str(error).partition("\n")[0])
        raise explained from error


def _explanation(told: str) -> ModelfleetError | None:
    if _FULL.search(told):
        return StorageFullError(
            "The manager has no room for more blobs. Delete model versions, collect garbage "
            "(`modelfleet manager gc`) or add room, then push again: what has arrived whole is kept."
        )
    if _REFUSED.search(told):
        return StorageUnreachableError(
            "The manager's blob store refuses it: its credentials are wrong or have expired, or there is no such "
            "bucket. The manager's log says which; correct blob_url or the store's variables, then retry."
        )
    return StorageUnreachableError("The manager's blob store does not answer. Retry.") if _FAILED.match(told) else None
