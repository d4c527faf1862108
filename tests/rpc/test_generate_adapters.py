"""LoRA adapters as versions of one base."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness.generating import Fleet, running
from harness.tiny_generator import spoken, write_adapter, write_tiny_generator
from modelfleet.bundle.directory import open_directory
from modelfleet.inference.generation import genai
from modelfleet.runtime.errors import InvalidBundleError, StateConflictError

ALIASES = ("stable", "first", "second")
WORDS = [random.Random(3).randrange(2, 300) for _ in range(97)]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with running(tmp_path) as fleet:
        yield fleet


async def push(fleet: Fleet, folder: Path, alias: str = "stable") -> int:
    """Push a folder as the next version of `words`, wait until it is served, and return the bytes that were sent."""
    bundle, paths = await asyncio.to_thread(open_directory, folder)
    pushed = await fleet.client.push(bundle, paths, "words", alias=alias)
    number = pushed.model_version.model_version
    await fleet.client.wait_until_served(f"words@{number}", timeout_s=20)
    await fleet.client.wait_until_served(f"words@{alias}", model_version=number, timeout_s=20)
    return pushed.sent_bytes


async def test_versions_with_adapters_share_their_base_and_answer_each_in_its_own_way(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    open_model = genai._model  # noqa: SLF001  the seam to the library

    def counted(*arguments: Any) -> Any:
        opened.append(arguments)
        return open_model(*arguments)

    monkeypatch.setattr(genai, "_model", counted)
    sent = [
        await push(fleet, write_tiny_generator(tmp_path / "base", WORDS, listens=True)),
        await push(fleet, write_tiny_generator(tmp_path / "first", WORDS, listens=True, adapted_to=40), "first"),
        await push(fleet, write_tiny_generator(tmp_path / "second", WORDS, listens=True, adapted_to=50), "second"),
    ]

    answers = await asyncio.gather(
        *(fleet.say(f"words@{alias}", prompt=[seed], max_tokens=30) for alias in ALIASES for seed in (5, 6, 7, 8))
    )

    said = [answer.ids for answer in answers]
    assert said[:4] == [spoken(WORDS, [seed], 30, listens=True) for seed in (5, 6, 7, 8)]
    assert said[4:] == [[40] * 30] * 4 + [[50] * 30] * 4
    assert len(opened) == 1
    assert max(sent[1:]) < sent[0] / 10  # the adapter alone


async def test_a_base_stays_while_a_version_needs_it(fleet: Fleet, tmp_path: Path) -> None:
    await push(fleet, write_tiny_generator(tmp_path / "base", WORDS, listens=True))
    await push(fleet, write_tiny_generator(tmp_path / "first", WORDS, listens=True, adapted_to=40))

    await fleet.client.delete_model_version("words", 1)

    assert (await fleet.say(max_tokens=5)).ids == [40] * 5


async def test_adapters_that_do_not_fit_are_refused_and_the_base_is_served(fleet: Fleet, tmp_path: Path) -> None:
    await push(fleet, write_tiny_generator(tmp_path / "base", WORDS, listens=True))
    folder = write_tiny_generator(tmp_path / "adapted", WORDS, listens=True, adapted_to=40)
    adapter = folder / "lora.onnx_adapter"

    adapter.write_bytes(b"no adapter")
    with pytest.raises(StateConflictError, match=r"refuses the adapter 'lora.onnx_adapter'"):
        await push(fleet, folder)
    write_adapter(adapter, 40, prefix="other")
    with pytest.raises(StateConflictError, match="Invalid input name: other_"):
        await push(fleet, folder)
    adapter.unlink()
    with pytest.raises(InvalidBundleError, match=r"manifest's adapter is 'lora.onnx_adapter', which is not a file"):
        await push(fleet, folder)

    assert (await fleet.say("words@1", max_tokens=5)).ids == spoken(WORDS, [5, 6, 7], 5, listens=True)
