"""The tokenizer service for tests, wired as in production, on a free loopback port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelfleet.api.tokenizer.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from modelfleet.client.channel import open_async_channel
from modelfleet.tokenizer.__main__ import Settings, tokenizing

from harness.serving import until_serving


@asynccontextmanager
async def running_tokenizer(manager: str, cache_dir: Path, **settings: object) -> AsyncIterator[TokenizerServiceStub]:
    """Run the service until the block ends; `manager` is an address. Yields a stub connected to it."""
    defaults = {"host": "127.0.0.1", "port": 0, "drain_delay_s": 0, "drain_timeout_s": 2, "encoder_threads": 2}
    own = Settings(**{**defaults, "manager": manager, "cache_dir": cache_dir, **settings})
    async with tokenizing(own) as server, open_async_channel(f"127.0.0.1:{server.port}") as channel:
        await until_serving(f"127.0.0.1:{server.port}")
        yield TokenizerServiceStub(channel)
