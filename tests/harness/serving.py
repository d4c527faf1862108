"""Real servers for tests: the chassis on a free loopback port, around whatever servicers the test registers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
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


async def until_serving(address: str) -> None:
    """Return once the server's health says so."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(10):
        async for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return
