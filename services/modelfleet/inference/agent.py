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
from modelfleet.inference.eviction import Room
from modelfleet.inference.loading import KilledLoadingError, Loader
from modelfleet.inference.memory_budget import SessionMemory
from modelfleet.inference.models import HeldModel
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.states import VersionState
from modelfleet.runtime.errors import ManagerUnreachableError, ModelfleetError, OverloadedError
from modelfleet.runtime.memory import return_free_memory

_log = structlog.get_logger()

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_REPORT_INTERVAL_S = 10.0
_CANARY_REPORT_INTERVAL_S = 1.0  # the manager judges canaries by these

# No fault of the version that is downloaded: it stays on its way.
_MANAGER_AWAY = (ManagerUnreachableError, OverloadedError)


class Manager(Protocol):
    """What the agent asks of the manager."""

    def assignments(self) -> AsyncIterator[Assignment]:
        """Yield the newest assignment at once and after each change, for ever: lost connections are made again."""

    async def report(self, revision: int, versions: list[ServedVersion]) -> None:
        """Tell what this worker holds. Raises ManagerUnreachableError."""


class Agent:
    """Owns the lives of the versions in `served`."""

    def __init__(
        self,
        served: ServedModels,
        loader: Loader,
        engine: Engine,
        cache: Cache,
        manager: Manager,
        *,
        evicts: bool = False,
        max_loaded_versions: int = 0,
    ) -> None:
        self._served = served
        self._room = Room(served, self._unload, evicts=evicts, limit=max_loaded_versions)
        self._loader = loader
        self._engine = engine
        self._cache = cache
        self._manager = manager
        self._assignment: Assignment | None = None
        self._lives: dict[VersionKey, asyncio.Task[None]] = {}
        self._report_due = asyncio.Event()
        self._untidy = asyncio.Event()
        self._revision = 0
        self._stopping = False
        self.settled = asyncio.Event()
        """Set once everything in the first assignment is READY, or has a reason why it is not."""
        served.on_change(self._report_due.set)
        served.on_wanted(self._wake)

    async def run(self) -> None:
        """Serve assignments until cancelled: the one kept on disk first, then whatever the manager says."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report_changes())
                group.create_task(self._tidy())
                if kept := await asyncio.to_thread(self._cache.last_assignment):
                    self._take(kept)
                async for assignment in self._manager.assignments():
                    # The kept one does not count: a manager restored from a backup has gone back in its revisions.
                    if assignment.revision < self._revision:
                        _log.warning(
                            "older assignment ignored; if the manager was restored from a backup, restart the workers",
                            revision=assignment.revision,
                            newest=self._revision,
                        )
                    else:
                        self._revision = assignment.revision
                        is_news = assignment != self._assignment
                        self._take(assignment)  # before the disk: all workers are to follow at the same time
                        if is_news:
                            await self._keep(assignment)
        finally:
            self._stopping = True
            for life in self._lives.values():
                life.cancel()
            await asyncio.gather(*self._lives.values(), return_exceptions=True)

    async def _keep(self, assignment: Assignment) -> None:
        try:
            await asyncio.to_thread(self._cache.save_assignment, assignment)
        except OSError as error:  # such as a full disk: serving it matters more
            _log.warning("assignment not kept for the next start", error=str(error))

    def _take(self, assignment: Assignment) -> None:
        _log.info("assignment", revision=assignment.revision, versions=[str(v.key) for v in assignment.versions])
        self._assignment = assignment
        self._report_due.set()
        self._reconcile()

    def _reconcile(self) -> None:
        if self._stopping or self._assignment is None:
            return
        assigned = {version.key: version for version in self._assignment.versions}
        for key, wanted_version in assigned.items():
            if self._served.get(key) is None:
                version = self._served.add(wanted_version)
                self._start(self._live(version), version)
        self._flip(self._assignment.routes)
        routed = self._served.routed()
        for held in self._served.versions():
            # A manager that has lost its data may give the same number to another bundle.
            wanted = assigned[held.key] == held.assigned if held.key in assigned else held.key in routed
            life = self._lives.get(held.key)
            if wanted or held.state is VersionState.DRAINING:
                continue
            if held.state is not VersionState.READY and life:
                life.cancel()
            elif not life:  # else it has just become ready, and the end of that life comes here again
                self._start(self._retire(held), held)
        if all(held.state is VersionState.READY or held.reason for held in self._served.versions()):
            self.settled.set()
        self._untidy.set()

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

    def _start(self, life: Coroutine[Any, Any, None], version: ServedVersion) -> None:
        task = self._lives[version.key] = asyncio.create_task(life, name=str(version.key))
        task.add_done_callback(lambda task: self._ended(task, version))

    def _ended(self, task: asyncio.Task[None], version: ServedVersion) -> None:
        del self._lives[version.key]
        if not task.cancelled() and (error := task.exception()):
            _log.error("version's life ended unforeseen", version=str(version.key), exc_info=error)
        if version.state is not VersionState.READY:
            self._served.move(version, VersionState.UNLOADED)
        self._reconcile()

    async def _live(self, version: ServedVersion) -> None:
        """Bring a version to READY, trying again while it stays assigned."""
        pause = 0.0
        while True:
            try:
                await self._loader.fetch(version.assigned)
                await self._room.give(version, lambda: self._load(version))
            except Exception as error:  # noqa: BLE001  whatever it is, it is this version's failure alone
                _log.warning("version not loaded", version=str(version.key), exc_info=error)
                why = str(error) or type(error).__name__
                deadly = isinstance(error, KilledLoadingError)
                waits = version.state is VersionState.DOWNLOADING and isinstance(error, _MANAGER_AWAY)
            else:
                break
            # Only here, where no traceback keeps what was half loaded.
            await asyncio.to_thread(return_free_memory)
            self._served.move(version, VersionState.DOWNLOADING if waits else VersionState.FAILED, why)
            pause = _FIRST_RETRY_S if waits else min(2 * pause or _FIRST_RETRY_S, _LAST_RETRY_S)
            if deadly:  # until then, the other versions are served
                pause = _LAST_RETRY_S
            self._reconcile()
            await asyncio.sleep(pause)
            if version.state is VersionState.FAILED:
                self._served.move(version, VersionState.DOWNLOADING)
        if version.state is not VersionState.READY:
            assert version.model
            self._served.move(version, VersionState.READY, version.model.notes)

    async def _load(self, version: ServedVersion) -> HeldModel:
        return await self._loader.load(version.assigned, lambda state: self._entered(version, state))

    def _entered(self, version: ServedVersion, state: VersionState) -> None:
        # An evicted version stays READY while it is loaded again: it was proved on this very device.
        if not version.evicted:
            self._served.move(version, state)

    def _wake(self, version: ServedVersion) -> None:
        if not self._stopping and version.key not in self._lives:
            self._start(self._live(version), version)

    async def _retire(self, version: ServedVersion) -> None:
        """Let requests under way finish, then unload. Its end makes the version UNLOADED."""
        self._served.move(version, VersionState.DRAINING)
        await self._served.drained(version)
        await self._unload(version)

    async def _unload(self, version: ServedVersion) -> None:
        model, version.model = version.model, None  # at once: another may unload it, too
        if model:
            await self._loader.unload(model)
            metrics.observe_memory(str(version.key), SessionMemory())
            del model
            await asyncio.to_thread(return_free_memory)

    async def _tidy(self) -> None:
        while True:
            await self._untidy.wait()
            self._untidy.clear()
            assigned = self._assignment.versions if self._assignment else ()
            held = [version.assigned for version in self._served.versions()]
            try:
                await self._cache.keep_only([version.bundle for version in (*assigned, *held)])
            except OSError as error:
                _log.warning("cache not cleared", error=str(error))

    def _has_canary(self) -> bool:
        return self._assignment is not None and any(len(route.targets) > 1 for route in self._assignment.routes)

    async def _report_changes(self) -> None:
        while True:
            # Not wait_for, which before Python 3.12 may lose a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CANARY_REPORT_INTERVAL_S if self._has_canary() else _REPORT_INTERVAL_S):
                    await self._report_due.wait()
            self._report_due.clear()
            if self._assignment:
                try:
                    await self._manager.report(self._assignment.revision, self._served.versions())
                except ModelfleetError as error:
                    _log.info("report not delivered", error=error.message)
