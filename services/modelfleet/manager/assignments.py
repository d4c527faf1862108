"""Assignments: what workers should serve. Whole snapshots, each with a revision, sent when they change."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Self

import structlog
from sqlalchemy import exists, select
from sqlalchemy.exc import SQLAlchemyError

from modelfleet.manager.registry import ModelVersion, to_model_version
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AliasRow, AssignmentRevisionRow, ModelVersionRow
from modelfleet.runtime.errors import DrainingError, ModelfleetError

_RETRY_S = 1.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WeightedVersion:
    """A share of an alias: weight over the sum of weights."""

    model_version: int
    weight: int


@dataclass(frozen=True, slots=True)
class AliasRoute:
    """Where an alias points."""

    model: str
    alias: str
    targets: tuple[WeightedVersion, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Versions ordered by model and number, routes by model and alias. The greatest revision holds."""

    revision: int
    model_versions: tuple[ModelVersion, ...]
    routes: tuple[AliasRoute, ...]


class Assignments:
    """
    Keeps the newest assignment and tells all watchers of it, between entering and leaving its context.

    Every version that an alias names is assigned to every worker.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stale = asyncio.Event()
        self._condition = asyncio.Condition()
        self._current: Assignment
        self._changes = 0  # told of
        self._changes_read = 0  # of these, how many the current assignment has
        self._closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._current = await asyncio.to_thread(self._read)
        self._refreshing = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        self._refreshing.cancel()
        await asyncio.wait([self._refreshing])

    def changed(self) -> None:
        """Have the assignment read again. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._note_change)

    async def watch(self) -> AsyncGenerator[Assignment, None]:
        """
        Yield the newest assignment at once and again after each change; a slow watcher misses those in between.

        Whatever was acknowledged to somebody before the call is in the first.
        Raises DrainingError when this is closed.
        """
        seen = -1
        changes = self._changes
        while True:
            async with self._condition:
                while not self._closed and (self._changes_read < changes or self._current.revision <= seen):
                    await self._condition.wait()
                if self._closed:
                    raise DrainingError("The manager is shutting down. Keep serving what is assigned and watch again.")
                assignment = self._current
            seen = assignment.revision
            yield assignment

    async def close(self) -> None:
        """End every watch, and refuse new ones."""
        async with self._condition:
            self._closed = True
            self._condition.notify_all()

    async def _refresh(self) -> None:
        while True:
            await self._stale.wait()
            self._stale.clear()
            changes = self._changes
            try:
                newest = await asyncio.to_thread(self._read)
            except (SQLAlchemyError, ModelfleetError):
                _log.exception("assignment not read", retry_s=_RETRY_S)
                await asyncio.sleep(_RETRY_S)
                self._stale.set()
                continue
            _log.info("assignment changed", revision=newest.revision, model_versions=len(newest.model_versions))
            async with self._condition:
                self._current = newest
                self._changes_read = changes
                self._condition.notify_all()

    def _note_change(self) -> None:
        self._changes += 1
        self._stale.set()

    def _read(self) -> Assignment:
        with self._database.reading() as session:
            # The revision first: where reads are not of one moment, what follows is newer than it says, never older.
            revision = session.execute(select(AssignmentRevisionRow.revision)).scalar_one()
            routes = [
                AliasRoute(row.model, row.alias, (WeightedVersion(row.model_version, 1),))
                for row in session.scalars(select(AliasRow).order_by(AliasRow.model, AliasRow.alias))
            ]
            is_named = exists().where(
                AliasRow.model == ModelVersionRow.model, AliasRow.model_version == ModelVersionRow.model_version
            )
            versions = session.scalars(
                select(ModelVersionRow).where(is_named).order_by(ModelVersionRow.model, ModelVersionRow.model_version)
            )
            return Assignment(revision, tuple(to_model_version(row) for row in versions), tuple(routes))
