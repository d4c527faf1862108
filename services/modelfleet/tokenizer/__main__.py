"""Starts the tokenizer service."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import Field

from modelfleet.api.tokenizer.v1 import tokenizer_pb2_grpc
from modelfleet.client.channel import open_hop
from modelfleet.runtime.cpus import available_cpus
from modelfleet.runtime.server import Server, run, until_signalled
from modelfleet.runtime.settings import ServerSettings, read_settings
from modelfleet.tokenizer.chats import Chats
from modelfleet.tokenizer.disk_cache import DiskCache
from modelfleet.tokenizer.encoding_threads import EncodingThreads
from modelfleet.tokenizer.limits import Limits
from modelfleet.tokenizer.manager_client import ManagerClient
from modelfleet.tokenizer.prefetching import Prefetching
from modelfleet.tokenizer.servicer import TokenizerServicer
from modelfleet.tokenizer.tokenizers import TokenizerStore

SERVICES = ("modelfleet.api.tokenizer.v1.TokenizerService",)


class Settings(ServerSettings):
    """Settings of the tokenizer service."""

    port: int = Field(default=8002, ge=0, le=65535)
    """Port of the gRPC server; 0 picks a free one."""
    metrics_port: int = Field(default=9002, ge=0, le=65535)
    """Port of Prometheus metrics; 0 picks a free one."""
    manager: str = "localhost:8003"
    """Address of the manager, which sends the tokenizers of assigned models and of those that are asked for."""
    manager_timeout_s: float = Field(default=30, gt=0)
    """Longest time that the manager may take to send a tokenizer, and that readiness waits for it at the start."""
    cache_dir: Path = Path("~/.cache/modelfleet")
    """Directory whose folder `tokenizers` keeps tokenizers by digest, so that a restart needs no manager."""
    cached_tokenizers: int = Field(default=64, ge=1)
    """Tokenizers kept in memory; the one used longest ago leaves first."""
    cached_files: int = Field(default=256, ge=1)
    """Tokenizers kept on disk; the one used longest ago leaves first."""
    encoder_threads: int = Field(default_factory=available_cpus, ge=1)
    """Threads that encode; as many as the CPUs that the container may use, unless given."""
    max_texts: int = Field(default=16384, ge=1)
    """Most texts, or sequences of token ids, in one request."""
    max_text_bytes: int = Field(default=4 << 20, ge=1)
    """Largest text, and all messages of a conversation together, in bytes of UTF-8."""
    max_tokenizer_bytes: int = Field(default=128 << 20, ge=1)
    """Largest `tokenizer.json`."""
    chat_timeout_s: float = Field(default=1, gt=0)
    """Longest time that a model's chat template may take. A template that takes longer for a single word, too, is
    refused for a minute."""


@asynccontextmanager
async def tokenizing(settings: Settings) -> AsyncIterator[Server]:
    """Serve until the block ends, then drain."""
    disk = DiskCache(settings.cache_dir.expanduser() / "tokenizers", settings.cached_files)
    limits = Limits(max_texts=settings.max_texts, max_text_bytes=settings.max_text_bytes)
    threads = EncodingThreads(settings.encoder_threads)
    async with open_hop(settings.manager, max_message_bytes=settings.max_message_bytes) as channel:
        manager = ManagerClient(channel, timeout_s=settings.manager_timeout_s, max_bytes=settings.max_tokenizer_bytes)
        store = TokenizerStore(manager.fetch, disk, settings.cached_tokenizers)
        prefetching = Prefetching(manager.needed, store.hold)
        chats = Chats(store.content, settings.chat_timeout_s, settings.max_text_bytes)
        server = Server(settings, SERVICES)
        servicer = TokenizerServicer(
            *(store, threads, limits, chats),
            tokenizer_digest=manager.tokenizer_digest,
            chat_template=manager.chat_template,
        )
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server.grpc)
        await server.start()
        prefetching_task = asyncio.create_task(prefetching.run(), name="prefetching")
        ready_task = asyncio.create_task(_say_ready(server, prefetching, settings.manager_timeout_s), name="ready")
        try:
            yield server
        finally:
            ready_task.cancel()
            await server.drain()
            prefetching_task.cancel()
            await asyncio.wait({prefetching_task})
            threads.close()
            await chats.close()


async def _say_ready(server: Server, prefetching: Prefetching, timeout_s: float) -> None:
    """Be ready without the manager, too: what is cached can be served, and the rest says UNAVAILABLE."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await prefetching.settled.wait()
    await server.set_serving(serving=True)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with tokenizing(settings):
        await until_signalled()


def main() -> None:
    """Read the settings and serve."""
    settings = read_settings(
        Settings,
        "python -m modelfleet.tokenizer",
        "The tokenizer service of modelfleet: turns text into token ids and back, with the tokenizers of the models.",
    )
    # Threads are counted here, per request; the library's own pool would add as many again and spin between batches.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run(lambda: serve(settings), settings, "tokenizer")


if __name__ == "__main__":
    main()
