"""Blobs: the files of bundles, each stored once under its SHA-256."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime, timedelta

import prometheus_client
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from modelfleet.bundle.bundle import check_sha256
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow
from modelfleet.runtime.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    InvalidBundleError,
    InvalidInputError,
    StorageUnreachableError,
)

_MOST_DIGESTS = 10_000  # in one question; databases bind a limited number of values

_RECEIVED = prometheus_client.Counter("modelfleet_manager_received_bytes_total", "Bytes of blobs received.")
_SENT = prometheus_client.Counter("modelfleet_manager_sent_bytes_total", "Bytes of blobs sent.")


class Blobs:
    """
    The bytes in a store, and a row in the database for each blob that was stored whole and right.

    A blob is there when both are. The row is written last, so bytes that a crash left behind are not taken for a blob,
    and bytes that were lost behind the manager's back are missing and pushed again. Whoever deletes bytes holds the
    database's only writing session, as does whoever writes a row, so the bytes of a new row are never deleted.
    """

    def __init__(self, store: BlobStore, database: Database, url_lifetime: timedelta = timedelta(0)) -> None:
        """`url_lifetime` is how long a URL given out is good for; 0 to give out none."""
        self._store = store
        self._database = database
        self._url_lifetime = url_lifetime

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        """
        Return those of `digests` that are not stored, in their order. Raises InvalidInputError.

        The others are spared by garbage collection from now on for its grace period.
        """
        if len(digests) > _MOST_DIGESTS:
            raise InvalidInputError(
                f"{len(digests)} digests in one request; at most {_MOST_DIGESTS} are taken. Ask in parts.",
                field="sha256",
            )
        for digest in digests:
            _check_sha256(digest)
        return await self._missing(digests, wanted=True)

    async def find_lost(self, digests: Iterable[str]) -> list[str]:
        """Return those of `digests` that are not stored, in their order."""
        return await self._missing(digests, wanted=False)

    async def write(self, sha256: str, size: int, pieces: AsyncIterator[bytes]) -> None:
        """
        Store a blob from its pieces, hashed as they arrive.

        Raises InvalidInputError as soon as there are more than `size` bytes, and DigestMismatchError when there are
        fewer or they hash to something else. Nothing is kept then, nor when `pieces` raises or the task is cancelled,
        nor when there is no room: StorageFullError.
        """
        hasher = hashlib.sha256()
        received = 0
        async with self._store.writing(sha256) as write:
            async for piece in pieces:
                received += len(piece)
                _RECEIVED.inc(len(piece))
                if received > size:
                    raise InvalidInputError(
                        f"Blob {sha256} was announced with {size} bytes, but more came. Push the bundle again.",
                        field="chunk.data",
                    )
                await asyncio.to_thread(hasher.update, piece)
                await write(piece)
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
        size = await self._size(sha256)
        if not 0 <= offset <= size:
            raise InvalidInputError(
                f"offset is {offset}, but blob {sha256} has {size} bytes. Give 0 to {size}.", field="offset"
            )
        if offset == size:
            return
        try:
            async for piece in self._store.read(sha256, offset):
                _SENT.inc(len(piece))
                yield piece
        except FileNotFoundError as error:
            raise BlobNotFoundError(
                f"Blob {sha256} is registered, but its bytes are gone from the store. Push the bundle again.",
                field="sha256",
            ) from error

    async def signed_url(self, sha256: str) -> str:
        """Return a URL to read a blob from for a while; empty where the store has none. Raises BlobNotFoundError."""
        await self._size(sha256)
        return await self._store.signed_url(sha256, self._url_lifetime) if self._url_lifetime else ""

    async def _missing(self, digests: Iterable[str], *, wanted: bool) -> list[str]:
        asked = list(dict.fromkeys(digests))
        registered = await asyncio.to_thread(self._sizes, asked, wanted=wanted)
        stored = await self._store.sizes(registered)
        return [digest for digest in asked if digest not in stored or stored[digest] != registered[digest]]

    async def _size(self, sha256: str) -> int:
        _check_sha256(sha256)
        size = (await asyncio.to_thread(self._sizes, [sha256], wanted=False)).get(sha256)
        if size is None:
            raise BlobNotFoundError(f"No blob {sha256} is stored.", field="sha256")
        return size

    def _sizes(self, digests: Sequence[str], *, wanted: bool) -> dict[str, int]:
        with self._database.writing() if wanted else self._database.reading() as session:
            sizes = stored_sizes(session, digests)
            if wanted:
                note_use(session, sizes)
            return sizes

    def _record(self, sha256: str, size: int) -> None:
        self._store.settle(sha256)
        with self._database.writing() as session:
            stored = self._store.stat(sha256)
            if stored is None or stored.size != size:
                raise StorageUnreachableError(
                    f"The bytes of blob {sha256} were deleted from the store while they came in. Push again."
                )
            if session.get(BlobRow, sha256) is None:
                session.add(BlobRow(sha256=sha256, size=size, create_time=datetime.now(UTC)))
            else:
                note_use(session, [sha256])


def stored_sizes(session: Session, digests: Iterable[str]) -> dict[str, int]:
    """Return the sizes in bytes of those of `digests` that have a row."""
    sizes: dict[str, int] = {}
    for asked in _parts(digests):
        rows = session.execute(select(BlobRow.sha256, BlobRow.size).where(BlobRow.sha256.in_(asked)))
        sizes.update((digest, size) for digest, size in rows)
    return sizes


def note_use(session: Session, digests: Iterable[str]) -> None:
    """Begin the grace period of blobs anew, in which garbage collection spares them."""
    for asked in _parts(digests):
        session.execute(update(BlobRow).where(BlobRow.sha256.in_(asked)).values(last_used_time=datetime.now(UTC)))


def _parts(digests: Iterable[str]) -> list[list[str]]:
    unique = list(dict.fromkeys(digests))
    return [unique[start : start + _MOST_DIGESTS] for start in range(0, len(unique), _MOST_DIGESTS)]


def _check_sha256(digest: str) -> None:
    try:
        check_sha256(digest)
    except InvalidBundleError as error:  # no bundle is involved
        raise InvalidInputError(error.message, field=error.field) from None
