"""Garbage collection: blobs that no model version has, and that no push asked for of late, are deleted."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import prometheus_client
import structlog
from sqlalchemy import delete, exists, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow, BundleFileRow
from modelfleet.runtime.errors import InvalidInputError, ModelfleetError

_AT_ONCE = 100  # so that writers wait only briefly
_MOST_NAMED = 1000

_BLOBS = prometheus_client.Counter("modelfleet_manager_collected_blobs_total", "Blobs deleted as garbage.")
_BYTES = prometheus_client.Counter("modelfleet_manager_collected_bytes_total", "Bytes of blobs deleted as garbage.")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class GarbageBlob:
    """A blob that no model version has. Its size is in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Collected:
    """The first 1000 blobs by digest, and how many and how large all were."""

    blobs: tuple[GarbageBlob, ...] = ()
    blob_count: int = 0
    bytes: int = 0

    def plus(self, more: Sequence[GarbageBlob]) -> "Collected":
        """Return this with more blobs, whose digests follow."""
        return Collected(
            (*self.blobs, *more)[:_MOST_NAMED],
            self.blob_count + len(more),
            self.bytes + sum(blob.size for blob in more),
        )


class GarbageCollector:
    """
    Deletes unreferenced blobs a grace period after their last use.

    A use is a push's question for the blob, its arrival, or the deletion of a version that had it. Several managers may
    collect at once.
    """

    def __init__(self, database: Database, store: BlobStore, grace_s: float) -> None:
        self._database = database
        self._store = store
        self._grace_s = grace_s

    async def run(self, interval_s: float) -> None:
        """Collect now and at intervals, for ever; not at all with an interval of 0."""
        while interval_s:
            try:
                await asyncio.to_thread(self._store.sweep)
                await asyncio.to_thread(self.collect)
            except Exception:  # noqa: BLE001  whatever it is, such as a store that refuses: the next time begins anew
                _log.exception("garbage not collected", retry_s=interval_s)
            await asyncio.sleep(interval_s)

    def collect(self, *, dry_run: bool = False, grace_s: float | None = None) -> Collected:
        """
        Delete the garbage and return what it was. Blocking.

        `grace_s` replaces the usual grace period. Raises InvalidInputError when it is negative.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        if grace_s < 0:
            raise InvalidInputError(f"grace_period is {grace_s} s. Give 0 or more.", field="grace_period")
        oldest = datetime.now(UTC) - timedelta(seconds=grace_s)
        collected = Collected()
        after = ""
        while batch := self._found(oldest, after) if dry_run else self._deleted(oldest, after):
            collected = collected.plus(batch)
            after = batch[-1].sha256
        if not dry_run:
            self._account(collected)
            self._compact()
        return collected

    def _found(self, oldest: datetime, after: str) -> list[GarbageBlob]:
        with self._database.reading() as session:
            return _garbage(session, oldest, after)

    def _deleted(self, oldest: datetime, after: str) -> list[GarbageBlob]:
        # In one writing session, see Blobs. When this is cut between the two, bytes are gone whose row is there: the
        # blob is missing for pushes, and still garbage for the next collection.
        with self._database.writing() as session:
            batch = _garbage(session, oldest, after)
            digests = [blob.sha256 for blob in batch]
            self._store.delete(digests)
            session.execute(delete(BlobRow).where(BlobRow.sha256.in_(digests)))
            return batch

    def _account(self, collected: Collected) -> None:
        _BLOBS.inc(collected.blob_count)
        _BYTES.inc(collected.bytes)
        if collected.blob_count:
            _log.info("garbage collected", blobs=collected.blob_count, bytes=collected.bytes)

    def _compact(self) -> None:
        try:
            self._database.compact()
        except (ModelfleetError, SQLAlchemyError) as error:  # next time then: compacting needs room and a quiet moment
            _log.warning("database not compacted", error=str(error))


def _garbage(session: Session, oldest: datetime, after: str) -> list[GarbageBlob]:
    last_use = func.coalesce(BlobRow.last_used_time, BlobRow.create_time)
    is_referenced = exists().where(BundleFileRow.sha256 == BlobRow.sha256)
    rows = session.execute(
        select(BlobRow.sha256, BlobRow.size)
        .where(BlobRow.sha256 > after, last_use <= oldest, ~is_referenced)
        .order_by(BlobRow.sha256)
        .limit(_AT_ONCE)
    )
    return [GarbageBlob(sha256, size) for sha256, size in rows]
