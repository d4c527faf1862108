"""Room for more versions than fit: those that no request has used for longest make way, and come back when one does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from modelfleet.inference.served_models import ServedModels, ServedVersion

_log = structlog.get_logger()


class Room:
    """At most `limit` versions are loaded at once, 0 for no limit. `unload` lets go of a version that is drained."""

    def __init__(self, served: ServedModels, unload: Callable[[ServedVersion], Awaitable[None]], limit: int) -> None:
        self._served = served
        self._unload = unload
        self._limit = limit
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Give room to load one version in the block; requests to those that make way wait until they are back."""
        if not self._limit:
            yield
            return
        async with self._one_at_a_time:
            while victim := self._victim():
                _log.info("version evicted", version=str(victim.key))
                self._served.evict(victim)
                await self._served.drained(victim)
                await self._unload(victim)
            yield

    def _victim(self) -> ServedVersion | None:
        loaded = [version for version in self._served.versions() if version.model]
        candidates = [version for version in loaded if self._served.may_evict(version)]
        if len(loaded) < self._limit or not candidates:
            return None
        return min(candidates, key=lambda version: (version.in_use > 0, version.last_used))
