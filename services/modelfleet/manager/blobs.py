"""Blobs: the files of bundles, each stored once under its SHA-256, on local disk or in an object store."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import obstore
import prometheus_client
from obstore.store import LocalStore, ObjectStore, from_url
from sqlalchemy import select
from sqlalchemy.orm import Session

from modelfleet.bundle.bundle import check_sha256
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow
from modelfleet.runtime.errors import BlobNotFoundError, DigestMismatchError, InvalidBundleError, InvalidInputError

PIECE_BYTES = 1 << 20
_MOST_DIGESTS = 10_000  # in one question; databases bind a limited number of values
# A writer holds up to this many parts in memory. S3 takes at most 10,000 parts of at least 5 MiB.
_PART_BYTES = 8 << 20
_PARTS = 4
_ABANDONED_S = 3600  # another manager may be writing what is younger

_RECEIVED = prometheus_client.Counter("modelfleet_manager_received_bytes_total", "Bytes of blobs received.")
_SENT = prometheus_client.Counter("modelfleet_manager_sent_bytes_total", "Bytes of blobs sent.")


def open_store(url: str) -> ObjectStore:
    """Open the place of the bytes, making the directory of a `file://` URL. Raises obstore's errors."""
    return from_url(url, mkdir=True) if url.startswith("file:") else from_url(url)


class Blobs:
    """
    The bytes in a store, and a row in the database for each blob that is there, whole and right.

    The row is written last, so bytes that a crash left behind are not taken for a blob.
    """

    def __init__(self, store: ObjectStore, database: Database) -> None:
        self._store = store
        self._database = database

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of `digests` that are not stored, in their order. Raises InvalidInputError."""
        if len(digests) > _MOST_DIGESTS:
            raise InvalidInputError(
                f"{len(digests)} digests in one request; at most {_MOST_DIGESTS} are taken. Ask in parts.",
                field="sha256",
            )
        for digest in digests:
            _check_sha256(digest)
        stored = await asyncio.to_thread(self._sizes, digests)
        return [digest for digest in dict.fromkeys(digests) if digest not in stored]

    async def write(self, sha256: str, size: int, pieces: AsyncIterator[bytes]) -> None:
        """
        Store a blob from its pieces, hashed as they arrive.

        Raises InvalidInputError as soon as there are more than `size` bytes, and DigestMismatchError when there are
        fewer or they hash to something else. Nothing is kept then, nor when `pieces` raises or the task is cancelled.
        """
        path = _path(sha256)
        hasher = hashlib.sha256()
        received = 0
        # The store shows an object only once it is closed, and drops what was written when the block raises.
        async with obstore.open_writer_async(
            self._store, path, buffer_size=_PART_BYTES, max_concurrency=_PARTS
        ) as writer:
            async for piece in pieces:
                received += len(piece)
                _RECEIVED.inc(len(piece))
                if received > size:
                    raise InvalidInputError(
                        f"Blob {sha256} was announced with {size} bytes, but more came. Push the bundle again.",
                        field="chunk.data",
                    )
                await asyncio.to_thread(hasher.update, piece)
                await writer.write(piece)
            if received < size:
                raise DigestMismatchError(
                    f"Blob {sha256} was announced with {size} bytes, but {received} came. Push the bundle again."
                )
            if (actual := hasher.hexdigest()) != sha256:
                raise DigestMismatchError(
                    f"The bytes sent as blob {sha256} hash to {actual}. Nothing of them was kept. "
                    "Push the bundle again; if that fails too, the file changes meanwhile or the network corrupts it."
                )
        await asyncio.to_thread(self._record, sha256, size)

    async def read(self, sha256: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield a blob from `offset` on, at most 1 MiB at a time. Raises BlobNotFoundError and InvalidInputError."""
        _check_sha256(sha256)
        size = (await asyncio.to_thread(self._sizes, [sha256])).get(sha256)
        if size is None:
            raise BlobNotFoundError(f"No blob {sha256} is stored.", field="sha256")
        if not 0 <= offset <= size:
            raise InvalidInputError(
                f"offset is {offset}, but blob {sha256} has {size} bytes. Give 0 to {size}.", field="offset"
            )
        if offset == size:
            return
        try:
            stored = await obstore.get_async(self._store, _path(sha256), options={"range": {"offset": offset}})
        except FileNotFoundError as error:
            raise BlobNotFoundError(
                f"Blob {sha256} is registered, but its bytes are gone from the store. Restore the store from a backup.",
                field="sha256",
            ) from error
        async for buffer in stored.stream(min_chunk_size=PIECE_BYTES):
            for start in range(0, len(buffer), PIECE_BYTES):
                piece = bytes(buffer[start : start + PIECE_BYTES])
                _SENT.inc(len(piece))
                yield piece

    def sweep(self) -> None:
        """
        Delete what killed writers left on local disk. Blocking.

        Object stores do this by themselves, given a lifecycle rule for incomplete multipart uploads.
        """
        if root := self._local_root:
            for leftover in root.glob("sha256/*/*#*"):  # obstore's names for files that are being written
                if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                    leftover.unlink()

    @property
    def _local_root(self) -> Path | None:
        return self._store.prefix if isinstance(self._store, LocalStore) else None

    def _sizes(self, digests: Sequence[str]) -> dict[str, int]:
        with self._database.reading() as session:
            return stored_sizes(session, digests)

    def _record(self, sha256: str, size: int) -> None:
        if root := self._local_root:
            _flush(root / _path(sha256))
        with self._database.writing() as session:
            if session.get(BlobRow, sha256) is None:
                session.add(BlobRow(sha256=sha256, size=size, create_time=datetime.now(UTC)))


def stored_sizes(session: Session, digests: Iterable[str]) -> dict[str, int]:
    """Return the sizes in bytes of those of `digests` that are stored."""
    asked = list(dict.fromkeys(digests))
    sizes: dict[str, int] = {}
    for start in range(0, len(asked), _MOST_DIGESTS):
        rows = session.execute(
            select(BlobRow.sha256, BlobRow.size).where(BlobRow.sha256.in_(asked[start : start + _MOST_DIGESTS]))
        )
        sizes.update((digest, size) for digest, size in rows)
    return sizes


def _path(sha256: str) -> str:
    return f"sha256/{sha256[:2]}/{sha256}"


def _flush(path: Path) -> None:
    # obstore renames without fsync: after a power cut the name could stand for no bytes. The directories' entries too.
    for name in (path, path.parent, path.parent.parent):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_sha256(digest: str) -> None:
    try:
        check_sha256(digest)
    except InvalidBundleError as error:  # no bundle is involved
        raise InvalidInputError(error.message, field=error.field) from None
