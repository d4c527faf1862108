"""
Holds what assigned versions need before anybody asks for it.

Every replica of the service watches what workers are assigned. A version's tokenizer is then here by the time that
workers have loaded it, and is not missed when the manager is gone at the first request.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from modelfleet.runtime.errors import ManagerUnreachableError, ModelfleetError, OverloadedError

_log = structlog.get_logger()

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0

# No fault of the file.
_MANAGER_AWAY = (ManagerUnreachableError, OverloadedError)


class Kind(StrEnum):
    """What a file is to the service."""

    TOKENIZER = "tokenizer"
    CHAT_TEMPLATE = "chat template"


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A file that an assigned version needs here, by its SHA-256."""

    kind: Kind
    digest: str


class Prefetching:
    """
    Fetches the files of each snapshot that `needed` yields, and forgets those that a later one no longer has.

    `needed` yields the whole of what is needed at once and after each change, or None when the manager cannot be
    asked. `hold` brings a file here, and raises ModelfleetError.
    """

    def __init__(
        self,
        needed: Callable[[], AsyncIterator[frozenset[NeededFile] | None]],
        hold: Callable[[NeededFile], Awaitable[None]],
    ) -> None:
        self._needed = needed
        self._hold = hold
        self._files: dict[NeededFile, asyncio.Task[None]] = {}
        self.settled = asyncio.Event()
        """Set once every file of the first snapshot is here or cannot be had, or the manager cannot be asked."""

    async def run(self) -> None:
        """Follow the manager until cancelled."""
        async with asyncio.TaskGroup() as group:
            async for needed in self._needed():
                if needed is None:
                    self.settled.set()
                    continue
                for file in self._files.keys() - needed:
                    self._files.pop(file).cancel()
                for file in needed - self._files.keys():
                    self._files[file] = group.create_task(self._until_held(file))
                if not self.settled.is_set():
                    group.create_task(self._settle(list(self._files.values())))

    async def _settle(self, fetching: list[asyncio.Task[None]]) -> None:
        if fetching:
            await asyncio.wait(fetching)
        self.settled.set()

    async def _until_held(self, file: NeededFile) -> None:
        pause = _FIRST_RETRY_S
        while True:
            try:
                await self._hold(file)
            except _MANAGER_AWAY as error:
                self.settled.set()
                _log.info("not fetched yet", kind=file.kind, digest=file.digest, error=error.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_RETRY_S)
            except ModelfleetError as error:  # each request for it says why again
                _log.warning("cannot be used", kind=file.kind, digest=file.digest, error=error.message)
                return
            except Exception:  # noqa: BLE001  whatever it is, it must not keep the others from coming
                _log.exception("not fetched", kind=file.kind, digest=file.digest)
                return
            else:
                return
