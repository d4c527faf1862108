"""Assignments: what workers should serve. Whole snapshots, each with a revision, sent when they change."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import structlog
from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from modelfleet.manager.models import ModelVersion, to_model_version
from modelfleet.manager.placement import pools_of, serves
from modelfleet.manager.rollout_decisions import Rollout
from modelfleet.manager.rollout_states import HOLDING_BOTH, RolloutState
from modelfleet.manager.rollouts import to_rollout
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AliasRow, AssignmentRevisionRow, ModelRow, ModelVersionRow, RolloutRow
from modelfleet.runtime.errors import DrainingError

_RETRY_S = 1.0
_POLL_S = 1.0  # for what other managers change

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
    """
    Versions ordered by model and number, routes by model and alias. The greatest revision holds.

    `placements` are the pools that serve a model, by its name; a model that is not there is served by all.
    """

    revision: int
    model_versions: tuple[ModelVersion, ...]
    routes: tuple[AliasRoute, ...]
    placements: Mapping[str, tuple[str, ...]]

    def of(self, pool: str) -> Self:
        """Return what one pool should serve."""
        return replace(
            self,
            model_versions=tuple(version for version in self.model_versions if self._serves(pool, version.model)),
            routes=tuple(route for route in self.routes if self._serves(pool, route.model)),
        )

    def _serves(self, pool: str, model: str) -> bool:
        return serves(pool, self.placements.get(model, ()))


class Assignments:
    """
    Keeps the newest assignment and tells all watchers of it, between entering and leaving its context.

    Every version that an alias names is assigned to every worker of the pools that serve the model, and during a
    rollout its old and its new version.
    What another manager changes in the same database is found within a second.
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
        self._tasks = [asyncio.create_task(self._refresh()), asyncio.create_task(self._poll())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

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
            except Exception:  # noqa: BLE001  whatever it is: without this task no worker would hear of anything again
                _log.exception("assignment not read", retry_s=_RETRY_S)
                await asyncio.sleep(_RETRY_S)
                self._stale.set()
                continue
            _log.info("assignment changed", revision=newest.revision, model_versions=len(newest.model_versions))
            async with self._condition:
                self._current = newest
                self._changes_read = changes
                self._condition.notify_all()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                revision = await asyncio.to_thread(self._read_revision)
            except Exception as error:  # noqa: BLE001  as in _refresh
                _log.warning("revision not read", error=str(error))
            else:
                if revision != self._current.revision:
                    self._note_change()

    def _note_change(self) -> None:
        self._changes += 1
        self._stale.set()

    def _read(self) -> Assignment:
        with self._database.reading() as session:
            # The revision first: where reads are not of one moment, what follows is newer than it says, never older.
            revision = _revision(session)
            aliases = session.scalars(select(AliasRow).order_by(AliasRow.model, AliasRow.alias)).all()
            rollouts = session.scalars(select(RolloutRow).where(RolloutRow.state.in_(HOLDING_BOTH))).all()
            numbers = {(row.model, row.model_version) for row in aliases}
            for row in rollouts:
                numbers |= {(row.model, row.model_version), (row.model, row.old_model_version)}
            by_key = tuple_(ModelVersionRow.model, ModelVersionRow.model_version)
            versions = session.scalars(
                select(ModelVersionRow)
                .where(by_key.in_(numbers))
                .order_by(ModelVersionRow.model, ModelVersionRow.model_version)
            )
            canaries = {(row.model, row.alias): to_rollout(row) for row in rollouts if row.state == RolloutState.CANARY}
            routes = [_route(row, canaries.get((row.model, row.alias))) for row in aliases]
            placed = session.scalars(select(ModelRow).where(ModelRow.model.in_({model for model, _ in numbers})))
            placements = {row.model: pools_of(row) for row in placed}
            return Assignment(revision, tuple(to_model_version(row) for row in versions), tuple(routes), placements)

    def _read_revision(self) -> int:
        with self._database.reading() as session:
            return _revision(session)


def _revision(session: Session) -> int:
    return session.execute(select(AssignmentRevisionRow.revision)).scalar_one()


def _route(row: AliasRow, canary: Rollout | None) -> AliasRoute:
    if canary is None:
        return AliasRoute(row.model, row.alias, (WeightedVersion(row.model_version, 1),))
    percent = canary.events[-1].percent
    # The new version first: affinity keys fall on it from 0 up, so that those it has it keeps when its share grows.
    shares = (WeightedVersion(canary.spec.model_version, percent), WeightedVersion(row.model_version, 100 - percent))
    return AliasRoute(row.model, row.alias, shares)
