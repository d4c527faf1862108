"""The three services in this process, serving models of `tiny_generator`, and what they say."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import write_golden
from modelfleet.bundle.golden_text import GoldenText
from modelfleet.client import AsyncClient
from modelfleet.inference.__main__ import Settings, working
from modelfleet.tokenizer.__main__ import Settings as TokenizerSettings
from modelfleet.tokenizer.__main__ import tokenizing
from prometheus_client import REGISTRY

from harness.manager import running_manager
from harness.tiny_generator import write_tiny_generator


@dataclass(frozen=True)
class Said:
    """All chunks of an answer."""

    chunks: list[Any]

    @property
    def ids(self) -> list[int]:
        return [id_ for chunk in self.chunks for id_ in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def of(self, index: int) -> "Said":
        return Said([chunk for chunk in self.chunks if chunk.index == index])

    @property
    def last(self) -> Any:
        return self.chunks[-1]


@dataclass(frozen=True)
class Fleet:
    """The three services in this process, and a client of them."""

    client: AsyncClient
    address: str
    directory: Path

    async def push(
        self, name: str, script: list[int], *, template: str = "", golden: Sequence[GoldenText] = (), **values: Any
    ) -> None:
        """Push a model and wait until its alias `stable` leads to it."""
        folder = write_tiny_generator(self.directory / f"{name}-{random.random()}", script, **values)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        if golden:
            write_golden(folder / GOLDEN_FILE, [text.example() for text in golden])
        bundle, paths = await asyncio.to_thread(open_directory, folder)
        pushed = await self.client.push(bundle, paths, name, alias="stable")
        await self.client.wait_until_served(f"{name}@{pushed.model_version.model_version}", timeout_s=20)
        await self.client.wait_until_served(name, timeout_s=20)

    async def say(self, model: str = "words", text: str = "", prompt: list[int] | None = None, **options: Any) -> Said:
        """Return all of an answer: to a text, to messages, or to token ids."""
        if not text and "messages" not in options:
            options["token_ids"] = prompt or [5, 6, 7]
        return Said([chunk async for chunk in self.client.generate(model, text, **options)])


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[Fleet]:
    """Run the services until the block ends; `settings` are the worker's."""
    own: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "drain_delay_s": 0, "drain_timeout_s": 2}
    async with running_manager(directory / "manager") as manager:
        own["manager"] = manager.address
        tokenizers = TokenizerSettings(**own, cache_dir=directory / "tokenizers", chat_timeout_s=0.5)
        async with tokenizing(tokenizers) as tokenizer:
            own["tokenizer"] = f"127.0.0.1:{tokenizer.port}"
            own |= {"cache_dir": directory / "cache", "threads": 1, "canary_interval_s": 0}
            async with (
                working(Settings(**{**own, **settings})) as worker,
                AsyncClient(
                    inference=f"127.0.0.1:{worker.port}", tokenizer=own["tokenizer"], manager=manager.address
                ) as client,
            ):
                yield Fleet(client, f"127.0.0.1:{worker.port}", directory)


def streams(state: str) -> float:
    """Return the metric of `words@1`'s continuations in a state."""
    return REGISTRY.get_sample_value("modelfleet_streams", {"model": "words@1", "state": state}) or 0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread brings about."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the engine's thread sets no event
            await asyncio.sleep(0.01)
