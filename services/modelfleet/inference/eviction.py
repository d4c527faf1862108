"""Room for more versions than fit: those that no request has used for longest make way, and come back when one does."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from modelfleet.inference.models import HeldModel
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.runtime.errors import InsufficientMemoryError

_log = structlog.get_logger()


class Room:
    """
    Where versions are loaded, one at a time, so that loading takes little from serving.

    Others make way, where that `evicts`, for one that does not fit into memory, and for one beyond `limit`, 0 for no
    limit; requests to them wait until they are back. `unload` lets go of a version that is drained.
    """

    def __init__(
        self, served: ServedModels, unload: Callable[[ServedVersion], Awaitable[None]], *, evicts: bool, limit: int
    ) -> None:
        self._served = served
        self._unload = unload
        self._evicts = evicts
        self._limit = limit
        self._one_at_a_time = asyncio.Lock()

    async def give(self, version: ServedVersion, load: Callable[[], Awaitable[HeldModel]]) -> None:
        """Have a version loaded. Raises what `load` raises, InsufficientMemoryError if nothing can help against it."""
        async with self._one_at_a_time:
            if version.model:  # it was to make way, and stayed after all
                return
            victims = self._beyond_limit()
            while True:
                for victim in victims:
                    await self._evict(victim)
                try:
                    version.model = await load()
                    break
                except InsufficientMemoryError as error:
                    victims = self._holding(error.missing_host_bytes, error.missing_device_bytes)
                    if not victims:
                        raise
                # Only after that block is what was half loaded let go of.
            if version.record:
                version.model.record.resume(version.record)
            version.record = version.model.record
            version.last_used = time.monotonic()  # else what has just been loaded would be the first to make way
            if version.evicted:  # within the room: none may evict it again before it has answered
                await self._served.restore(version)

    async def _evict(self, victim: ServedVersion) -> None:
        _log.info("version evicted", version=str(victim.key))
        self._served.evict(victim)
        try:
            await self._served.drained(victim)
        except asyncio.CancelledError:  # the version that needs its place is no longer assigned
            if victim.evicted:  # and not on its way out itself by now
                await self._served.restore(victim)
            raise
        await self._unload(victim)

    def _beyond_limit(self) -> Sequence[ServedVersion]:
        loaded = sum(1 for version in self._served.versions() if version.model)
        return self._candidates()[: max(0, loaded + 1 - self._limit)] if self._limit else ()

    def _holding(self, host_bytes: int, device_bytes: int) -> Sequence[ServedVersion]:
        """Return those that hold at least so much together, as it was measured; none where all are not enough."""
        victims: list[ServedVersion] = []
        for version in self._candidates() if self._evicts and (host_bytes or device_bytes) else ():
            assert version.model
            victims.append(version)
            memory = version.model.memory
            host_bytes -= memory.host_bytes + memory.host_peak_bytes  # sessions keep what a batch has made them take
            device_bytes -= memory.device_bytes + memory.device_peak_bytes
            if host_bytes <= 0 and device_bytes <= 0:
                return victims
        return ()

    def _candidates(self) -> Sequence[ServedVersion]:
        """Return what may make way: what no request uses first, and of that what was used last longest ago."""
        loaded = [version for version in self._served.versions() if version.model and self._served.may_evict(version)]
        return sorted(loaded, key=lambda version: (version.in_use > 0, version.last_used))
