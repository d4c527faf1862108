"""Real servers for tests: the chassis on a free loopback port, around whatever servicers the test registers."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from modelfleet.runtime.server import Server
from modelfleet.runtime.settings import ServerSettings


@asynccontextmanager
async def serving(
    register: Callable[[grpc.aio.Server], None], services: Sequence[str] = (), **settings: Any
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the address."""
    settings = {"host": "127.0.0.1", "drain_delay_s": 0, "drain_timeout_s": 2, **settings}
    server = Server(ServerSettings(**settings), services)
    register(server.grpc)
    await server.start()
    await server.set_serving(serving=True)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain()
