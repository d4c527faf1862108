"""grpc.health.v1, with watches that a server can end: by themselves they never do, and a drain waits for calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from grpc_health.v1 import health, health_pb2

if TYPE_CHECKING:
    from modelfleet.runtime.interceptors import Context


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # ships no hints
    """Answers Check and Watch; `set` is that of grpcio-health-checking."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802  as in the contract
        """Tell of each change until the caller leaves or the watches are ended."""
        watch = asyncio.create_task(super().Watch(request, context))
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait((watch, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            ending.cancel()
            await asyncio.gather(watch, ending, return_exceptions=True)

    def end_watches(self) -> None:
        """End the watches, also those to come."""
        self._ending.set()
