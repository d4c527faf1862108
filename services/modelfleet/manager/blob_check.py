"""The check of what is stored: every blob's bytes are there and have its digest, and no others lie about."""

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from modelfleet.manager.blob_store import BlobStore, StoredBytes
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow, BundleFileRow
from modelfleet.runtime.errors import InvalidInputError, quoted

# A page ends after the first group of blobs with which it has read this much or taken this long.
_PAGE_BYTES = 256 << 20
_PAGE_S = 2.0
_GROUP = re.compile(r"[0-9a-f]{2}")
_LAST_GROUP = 0xFF
_MOST_NAMED = 100
_DIGITS = 12

_log = structlog.get_logger()


class ProblemKind(StrEnum):
    """What is wrong with a blob."""

    MISSING = "MISSING"
    CORRUPT = "CORRUPT"
    ORPHAN = "ORPHAN"


@dataclass(frozen=True, slots=True)
class Problem:
    """A blob that is not as it should be. `model_versions` are some of those that have it, as `model@number`."""

    kind: ProblemKind
    sha256: str
    detail: str
    model_versions: tuple[str, ...] = ()
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class CheckedPage:
    """A part of the blobs. `next_token` is empty after the last."""

    problems: tuple[Problem, ...]
    blobs: int
    bytes: int
    next_token: str


class BlobCheck:
    """Compares rows, bytes and digests, a page at a time, beside all that the manager does meanwhile."""

    def __init__(self, database: Database, store: BlobStore, grace_s: float) -> None:
        self._database = database
        self._store = store
        self._grace = timedelta(seconds=grace_s)

    async def check(self, token: str, *, repair: bool) -> CheckedPage:
        """
        Check the page that `token` names, empty for the first. Raises InvalidInputError for one that is none.

        `repair` deletes corrupt bytes, rows of lost blobs that no version has, and orphans older than the grace period.
        """
        if token and not _GROUP.fullmatch(token):
            raise InvalidInputError(
                f"page_token {quoted(token)} is not one that this returned. Give next_page_token of the page before, "
                "or none for the first page.",
                field="page_token",
            )
        started = time.monotonic()
        problems: list[Problem] = []
        blobs = size = 0
        for group in range(int(token or "0", 16), _LAST_GROUP + 1):
            page = await self._check_group(f"{group:02x}", repair=repair)
            problems += page.problems
            blobs += page.blobs
            size += page.bytes
            if group < _LAST_GROUP and (size >= _PAGE_BYTES or time.monotonic() - started >= _PAGE_S):
                return CheckedPage(tuple(problems), blobs, size, f"{group + 1:02x}")
        return CheckedPage(tuple(problems), blobs, size, "")

    async def _check_group(self, start: str, *, repair: bool) -> CheckedPage:
        # Rows first: bytes come before their row, so whatever has a row has bytes in the listing that follows.
        rows = await asyncio.to_thread(self._rows, start)
        stored = await asyncio.to_thread(lambda: {one.sha256: one for one in self._store.listed(start)})
        suspects: list[tuple[Problem, StoredBytes | None]] = []
        size = 0
        for sha256 in sorted(rows.keys() | stored.keys()):
            found = stored.get(sha256)
            if sha256 not in rows:
                suspects.append((Problem(ProblemKind.ORPHAN, sha256, "bytes that are registered as no blob"), found))
            elif found is None:
                suspects.append((Problem(ProblemKind.MISSING, sha256, "its bytes are gone from the store"), None))
            elif wrong := await self._difference(found, rows[sha256]):
                suspects.append((Problem(ProblemKind.CORRUPT, sha256, wrong), found))
            else:
                size += found.size
        problems = await asyncio.to_thread(self._judge, suspects, repair=repair) if suspects else []
        return CheckedPage(tuple(problems), len(rows), size, "")

    async def _difference(self, found: StoredBytes, size: int) -> str:
        """Return what is wrong with the bytes of a blob, empty for nothing."""
        if found.size != size:
            return f"{found.size} bytes are stored of {size}"
        hasher = hashlib.sha256()
        try:
            async for piece in self._store.read(found.sha256, 0):
                await asyncio.to_thread(hasher.update, piece)
        except FileNotFoundError:
            return "its bytes went while they were read"
        return "" if hasher.hexdigest() == found.sha256 else f"its bytes hash to {hasher.hexdigest()[:_DIGITS]}…"

    def _rows(self, start: str) -> dict[str, int]:
        with self._database.reading() as session:
            group = BlobRow.sha256.between(start, f"{start}g")  # which follows all hexadecimal digits
            return {row.sha256: row.size for row in session.scalars(select(BlobRow).where(group))}

    def _judge(self, suspects: list[tuple[Problem, StoredBytes | None]], *, repair: bool) -> list[Problem]:
        """Drop those that were pushed or collected meanwhile, name the versions, and repair what shall be repaired."""
        judged = []
        # Whoever holds it deletes bytes safely, see Blobs; and nobody else does meanwhile.
        with self._database.writing() if repair else self._database.reading() as session:
            for problem, found in suspects:
                row = session.get(BlobRow, problem.sha256)
                if self._stands(problem, found, row):
                    named = replace(problem, model_versions=_model_versions(session, problem.sha256))
                    judged.append(self._repaired(session, named, row) if repair else named)
        return judged

    def _stands(self, problem: Problem, found: StoredBytes | None, row: BlobRow | None) -> bool:
        if problem.kind is ProblemKind.ORPHAN:
            assert found
            # A writer may be about to register what is younger.
            return row is None and found.modified <= datetime.now(UTC) - self._grace
        return row is not None and self._store.stat(problem.sha256) == found

    def _repaired(self, session: Session, problem: Problem, row: BlobRow | None) -> Problem:
        lost = problem.kind is ProblemKind.MISSING
        if row and not problem.model_versions:
            session.delete(row)
        elif lost:
            return problem
        if not lost:
            self._store.delete([problem.sha256])
        _log.warning("blob repaired", sha256=problem.sha256, kind=problem.kind, detail=problem.detail)
        return replace(problem, repaired=True)


def _model_versions(session: Session, sha256: str) -> tuple[str, ...]:
    query = (
        select(BundleFileRow.model, BundleFileRow.model_version)
        .filter_by(sha256=sha256)
        .distinct()
        .order_by(BundleFileRow.model, BundleFileRow.model_version)
        .limit(_MOST_NAMED)
    )
    return tuple(f"{model}@{number}" for model, number in session.execute(query))
