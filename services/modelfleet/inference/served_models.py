"""The model versions on this worker, and where model references lead. Belongs to the event loop."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import structlog

from modelfleet.bundle.reference import ModelReference
from modelfleet.inference import metrics
from modelfleet.inference.assignment import AssignedVersion, Route, VersionKey
from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.models import HeldModel
from modelfleet.inference.routing import Choice, affinity_point
from modelfleet.inference.states import VersionState, follows
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.affinity import affinity_key
from modelfleet.runtime.errors import ModelLoadingError

_log = structlog.get_logger()

# Loading is tried again later and later; another replica answers at once.
_ELSEWHERE_S = 0.1
_COMING = frozenset({VersionState.DOWNLOADING, VersionState.VERIFYING, VersionState.WARMING})


@dataclass(eq=False, slots=True)
class ServedVersion:
    """A version on this worker. `model` is there from READY until UNLOADED, but not while it is evicted."""

    assigned: AssignedVersion
    state: VersionState = VersionState.DOWNLOADING
    reason: str = ""
    model: HeldModel | None = None
    record: ModelRecord | None = None
    """What it has answered since it was READY for the first time, in all its sessions."""
    in_use: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    last_used: float = 0.0
    """When a request began to use it, or it was loaded, in seconds on the monotonic clock."""
    evicted: bool = False
    """It has been READY, made room for another version, and is loaded again by the next request for it."""
    back: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it is not evicted."""
    awaited_by: int = 0
    """Requests that wait until it is back."""

    @property
    def key(self) -> VersionKey:
        """Name and number."""
        return self.assigned.key


class NotHeldError(Exception):
    """Nothing here goes by that reference; whether it is registered at all, the manager knows."""


class EvictedError(Exception):
    """The version is READY and not loaded: wait until it is `back`."""

    def __init__(self, version: ServedVersion) -> None:
        super().__init__(str(version.key))
        self.version = version


class ServedModels:
    """All versions by key, and routes by model and alias."""

    def __init__(self) -> None:
        self._wanted: Callable[[ServedVersion], None] = lambda _: None
        self._listeners: list[Callable[[], None]] = []
        self._versions: dict[VersionKey, ServedVersion] = {}
        self._routes: dict[tuple[str, str], Route] = {}
        self._choices: dict[tuple[str, str], Choice] = {}

    def on_wanted(self, listener: Callable[[ServedVersion], None]) -> None:
        """Have `listener` called with an evicted version that a request wants."""
        self._wanted = listener

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after each change of a state."""
        self._listeners.append(listener)

    def versions(self) -> list[ServedVersion]:
        """Return all versions, ordered by name and number."""
        return [self._versions[key] for key in sorted(self._versions)]

    def get(self, key: VersionKey) -> ServedVersion | None:
        """Return a version, or None."""
        return self._versions.get(key)

    def add(self, assigned: AssignedVersion) -> ServedVersion:
        """Begin a version's life, in DOWNLOADING."""
        version = self._versions[assigned.key] = ServedVersion(assigned)
        self._changed(version)
        return version

    def move(self, version: ServedVersion, state: VersionState, reason: str = "") -> None:
        """Change a version's state. UNLOADED ends its life here."""
        version.state, version.reason = follows(version.state, state), reason
        version.evicted = False
        version.back.set()
        self._changed(version)

    def may_evict(self, version: ServedVersion) -> bool:
        """Return whether a version is loaded and could make room for another."""
        return version.state is VersionState.READY and not version.evicted

    def evict(self, version: ServedVersion) -> None:
        """Let no more requests use a READY version until it is restored. It stays READY: it answers when it is back."""
        version.evicted, version.reason = True, "evicted: the next request for it loads it again"
        version.back.clear()
        self._changed(version)

    async def restore(self, version: ServedVersion) -> None:
        """Let requests use an evicted version, which is loaded again. Returns when those that waited do use it."""
        version.evicted, version.reason = False, version.model.notes if version.model else ""
        version.back.set()
        self._changed(version)
        while version.awaited_by:  # noqa: ASYNC110  their turns are next; there is nothing to wait for
            await asyncio.sleep(0)

    async def brought_back(self, version: ServedVersion) -> None:
        """Have an evicted version loaded; return once it is, or cannot be."""
        self._wanted(version)
        version.awaited_by += 1
        try:
            await version.back.wait()
        finally:
            version.awaited_by -= 1

    def _changed(self, version: ServedVersion) -> None:
        _log.info("version state", version=str(version.key), state=version.state.value, reason=version.reason)
        if version.state is VersionState.UNLOADED:
            del self._versions[version.key]
            metrics.forget_model(str(version.key))
        else:
            for state in VersionState:
                metrics.VERSION_STATE.labels(str(version.key), state.value).set(state is version.state)
        for listener in self._listeners:
            listener()

    def route(self, model: str, alias: str) -> Route | None:
        """Return where an alias points now."""
        return self._routes.get((model, alias))

    def routed(self) -> set[VersionKey]:
        """Return the versions that aliases name now."""
        return {
            VersionKey(route.model, target.model_version) for route in self._routes.values() for target in route.targets
        }

    def set_routes(self, routes: Mapping[tuple[str, str], Route]) -> None:
        """Let all aliases point elsewhere at once: no request sees some of them moved and others not."""
        before, self._routes = self._choices, dict(routes)
        self._choices = {
            key: before[key] if key in before and before[key].targets == route.targets else Choice(route.targets)
            for key, route in routes.items()
        }

    def aliases(self, key: VersionKey) -> list[str]:
        """Return the aliases that name a version now, sorted."""
        return sorted(
            route.alias
            for route in self._routes.values()
            if route.model == key.model and any(target.model_version == key.model_version for target in route.targets)
        )

    def look_up(self, reference: ModelReference) -> ServedVersion:
        """
        Return the version that a reference leads to, most often where it leads to several, in any state.

        That is no use of it: no turn is taken, and what is evicted stays so. Raises NotHeldError.
        """
        return self._find(reference, Choice.largest)

    def use(self, reference: ModelReference) -> AbstractContextManager[tuple[VersionKey, HeldModel]]:
        """
        Choose the version that a reference leads to; enter what is returned at once, and it stays loaded until the end.

        Raises NotHeldError, EvictedError, or ModelLoadingError, also where it could not be loaded.
        """
        version = self._find(reference, Choice.next)
        if version.state is VersionState.FAILED:
            why = version.reason.rstrip(".")
            failed = ModelLoadingError(
                f"{version.key} could not be loaded on this worker: {why}. Ask a replica that has loaded it."
            )
            failed.retry_after_s = _ELSEWHERE_S
            raise failed
        if version.evicted:
            raise EvictedError(version)
        if version.state is not VersionState.READY or version.model is None:
            doing = "is still loading" if version.state in _COMING else "is being unloaded"
            why = f": {version.reason}" if version.reason else ""
            raise ModelLoadingError(f"{version.key} {doing} on this worker ({version.state.value}){why}. Retry.")
        version.last_used = time.monotonic()
        return self._using(version, version.model)

    @contextmanager
    def _using(self, version: ServedVersion, model: HeldModel) -> Iterator[tuple[VersionKey, HeldModel]]:
        with self.hold(version):
            yield version.key, model

    @contextmanager
    def hold(self, version: ServedVersion) -> Iterator[None]:
        """Keep a READY version from being unloaded before the block ends."""
        version.in_use += 1
        version.idle.clear()
        try:
            yield
        finally:
            version.in_use -= 1
            if not version.in_use:
                version.idle.set()

    def _find(self, reference: ModelReference, choose: Callable[[Choice], int]) -> ServedVersion:
        number = reference.model_version
        if reference.alias is not None:
            choice = self._choices.get((reference.model, reference.alias))
            if choice is None:
                raise NotHeldError
            key = affinity_key.get()
            point = affinity_point(reference.model, reference.alias, key) if key else None
            chosen = choose(choice) if point is None else choice.at(point)
            number = self._answering(reference.model, chosen, choice)
        version = self._versions.get(VersionKey(reference.model, number or 0))
        if version is None:
            raise NotHeldError
        return version

    def _answering(self, model: str, chosen: int, choice: Choice) -> int:
        """Return the chosen version, or where it is not READY one of the alias that is."""
        for number in (chosen, *(target.model_version for target in choice.targets)):
            version = self._versions.get(VersionKey(model, number))
            if version and version.state is VersionState.READY:
                return number
        return chosen

    async def close(self) -> None:
        """End the generation of text; requests have ended by now."""
        for version in self.versions():
            if isinstance(version.model, GenerativeModel):
                await version.model.close()

    async def drained(self, version: ServedVersion) -> None:
        """Return once no request uses the version."""
        if version.in_use:
            await version.idle.wait()
