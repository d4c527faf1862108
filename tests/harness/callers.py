"""The two clients behind one face, so that a test of one is a test of both."""

import asyncio
from dataclasses import dataclass
from typing import Any

from modelfleet.client import AsyncClient, Client


@dataclass(frozen=True)
class Caller:
    """Calls `method` on a fresh client of one of the two kinds. `targets` are the client's settings."""

    asynchronous: bool

    async def __call__(self, targets: dict[str, Any], method: str, *args: object, **kwargs: object) -> Any:
        if self.asynchronous:
            async with AsyncClient(**targets) as client:
                return await getattr(client, method)(*args, **kwargs)
        with Client(**targets) as client:
            return await asyncio.to_thread(getattr(client, method), *args, **kwargs)
