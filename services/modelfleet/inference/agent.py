"""
Makes this worker serve what it is assigned.

Level-triggered: `_reconcile` compares the newest assignment with what is held, starts what is missing and retires what
is left over. It runs after every change of either, so that a missed message or a failed load heals by itself.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol

import structlog

from modelfleet.inference import metrics
from modelfleet.inference.assignment import Assignment, Route, VersionKey
from modelfleet.inference.cache import Cache
from modelfleet.inference.engine import Engine
from modelfleet.inference.loading import Loader
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.states import VersionState
from modelfleet.runtime.errors import ModelfleetError, UnavailableError

_log = structlog.get_logger()

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_REPORT_INTERVAL_S = 10.0


class Manager(Protocol):
    """What the agent asks of the manager."""

    def assignments(self) -> AsyncIterator[Assignment]:
        """Yield the newest assignment at once and after each change, for ever: lost connections are made again."""

    async def report(self, revision: int, versions: list[ServedVersion]) -> None:
        """Tell what this worker holds. Raises ManagerUnreachableError."""


class Agent:
    """Owns the lives of the versions in `served`."""

    def __init__(self, served: ServedModels, loader: Loader, engine: Engine, cache: Cache, manager: Manager) -> None:
        self._served = served
        self._loader = loader
        self._engine = engine
        self._cache = cache
        self._manager = manager
        self._assignment: Assignment | None = None
        self._lives: dict[VersionKey, asyncio.Task[None]] = {}
        self._report_due = asyncio.Event()
        self._stopping = False
        self.settled = asyncio.Event()
        """Set once everything in the first assignment is READY or FAILED."""
        served.on_change(self._report_due.set)

    async def run(self) -> None:
        """Serve assignments until cancelled: the one kept on disk first, then whatever the manager says."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report_changes())
                if kept := self._cache.last_assignment():
                    self._take(kept)
                async for assignment in self._manager.assignments():
                    self._take(assignment)
        finally:
            self._stopping = True
            for life in self._lives.values():
                life.cancel()

    def _take(self, assignment: Assignment) -> None:
        if self._assignment and assignment.revision < self._assignment.revision:
            return
        _log.info("assignment", revision=assignment.revision, versions=[str(v.key) for v in assignment.versions])
        if assignment != self._assignment:
            self._cache.save_assignment(assignment)
        self._assignment = assignment
        self._report_due.set()
        self._reconcile()

    def _reconcile(self) -> None:
        if self._stopping or self._assignment is None:
            return
        for assigned in self._assignment.versions:
            if self._served.get(assigned.key) is None and assigned.key not in self._lives:
                self._start(self._live(self._served.add(assigned)), assigned.key)
        self._flip(self._assignment.routes)
        wanted = {assigned.key for assigned in self._assignment.versions} | self._served.routed()
        for held in self._served.versions():
            if held.key in wanted or held.state is VersionState.DRAINING:
                continue
            if held.state is VersionState.READY:
                self._start(self._retire(held), held.key)
            elif life := self._lives.get(held.key):
                life.cancel()
        if all(held.state in (VersionState.READY, VersionState.FAILED) for held in self._served.versions()):
            self.settled.set()

    def _flip(self, routes: tuple[Route, ...]) -> None:
        """Point aliases where the assignment says; one whose new target is not ready keeps a target that is."""
        now = {}
        for route in routes:
            current = self._served.route(route.model, route.alias)
            keeps = current is not None and self._ready(current) and not self._ready(route)
            now[route.model, route.alias] = current if current and keeps else route
        self._served.set_routes(now)

    def _ready(self, route: Route) -> bool:
        held = [self._served.get(VersionKey(route.model, target.model_version)) for target in route.targets]
        return all(version and version.state is VersionState.READY for version in held)

    def _start(self, life: Coroutine[Any, Any, None], key: VersionKey) -> None:
        task = self._lives[key] = asyncio.create_task(life, name=str(key))
        task.add_done_callback(lambda task: self._ended(task, key))

    def _ended(self, task: asyncio.Task[None], key: VersionKey) -> None:
        del self._lives[key]
        if not task.cancelled() and (error := task.exception()):
            _log.error("version's life ended unforeseen", version=str(key), exc_info=error)
        self._reconcile()

    async def _live(self, version: ServedVersion) -> None:
        """Bring a version to READY, trying again with growing pauses while it stays assigned."""
        pause = _FIRST_RETRY_S
        try:
            while version.model is None:
                try:
                    version.model = await self._loader.load(
                        version.assigned, lambda state: self._served.move(version, state)
                    )
                except (ModelfleetError, OSError) as error:
                    _log.warning("version failed", version=str(version.key), exc_info=error)
                    self._served.move(version, VersionState.FAILED, str(error))
                    self._reconcile()
                    await asyncio.sleep(pause)
                    if not isinstance(error, UnavailableError):
                        pause = min(2 * pause, _LAST_RETRY_S)
                    self._served.move(version, VersionState.DOWNLOADING)
        except asyncio.CancelledError:
            self._served.move(version, VersionState.UNLOADED)
            raise
        self._served.move(version, VersionState.READY)

    async def _retire(self, version: ServedVersion) -> None:
        """Let requests under way finish, then unload."""
        assert version.model
        self._served.move(version, VersionState.DRAINING)
        await self._served.drained(version)
        self._engine.detach(version.model)
        version.model = None
        metrics.forget_model(str(version.key))
        self._served.move(version, VersionState.UNLOADED)

    async def _report_changes(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._report_due.wait(), _REPORT_INTERVAL_S)
            self._report_due.clear()
            if self._assignment:
                try:
                    await self._manager.report(self._assignment.revision, self._served.versions())
                except ModelfleetError as error:
                    _log.info("report not delivered", error=error.message)
