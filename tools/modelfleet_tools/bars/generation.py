"""
Generated text beside the bare engine: `python -m modelfleet_tools.bars.generation`.

Beside it is onnxruntime-genai's own Engine in this process, given all prompts at once. Without paged attention it runs
batches of four, one after another. Both make the same tokens from the same prompts, in turns within one run.
"""

import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from rich.console import Console

from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole

_GOAL = 0.95
_MODEL = "smollm2"
_QUESTIONS = (
    "What is the capital of France?",
    "Tell me about cats.",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Who was Ada Lovelace?",
    "How do I bake bread?",
    "Name three colours.",
    "What is a prime number?",
)
_LONG_PROMPT_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Round:
    """Figures of one round; times are in seconds."""

    bare_tokens_per_s: float
    tokens_per_s: float
    equal: int
    """Of the streams, those whose tokens equal the bare engine's."""
    first_token_s: float
    gap_s: float
    """Median time between two chunks of a stream."""
    first_token_beside_long_prompt_s: float
    longest_gap_beside_long_prompt_s: float


class Bare:
    """The library's engine and nothing else."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og  # noqa: PLC0415  only this measurement needs it

        self._og = og
        self._model: Any = og.Model(str(folder))

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Return the tokens that each prompt is continued by, greedily."""
        engine = self._og.Engine(self._model)
        events = engine.create_event_buffer(64)
        requests = []
        for prompt in prompts:
            limits = self._og.RequestOptions()
            limits.set_max_session_tokens(len(prompt) + max_tokens)
            request = engine.create_request(options=limits)
            turn = self._og.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_max_generated_tokens(max_tokens)
            request.begin_turn(np.array(prompt, np.int32), turn)
            requests.append(request)
        said: dict[int, list[int]] = {id(request): [] for request in requests}
        while engine.has_pending_requests():
            for event in engine.run(events):
                if int(event.flags) & int(self._og.EngineEventFlags.TOKEN):
                    said[id(event.request)].append(event.token)
        return [said[id(request)] for request in requests]


@dataclass(slots=True)
class Heard:
    """What one stream brought, and when."""

    ids: list[int]
    times: list[float]
    asked: float

    @property
    def first_token_s(self) -> float:
        """Time to the first chunk."""
        return self.times[0] - self.asked

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks."""
        return np.diff(self.times).tolist()


async def _hear(client: AsyncClient, prompt: list[int], max_tokens: int) -> Heard:
    heard = Heard([], [], time.monotonic())
    async for chunk in client.generate(_MODEL, token_ids=prompt, max_tokens=max_tokens, temperature=0, timeout_s=600):
        heard.ids.extend(chunk.token_ids)
        heard.times.append(time.monotonic())
    return heard


async def _round(client: AsyncClient, bare: Bare, prompts: list[list[int]], max_tokens: int) -> Round:
    started = time.monotonic()
    expected = await asyncio.to_thread(bare.generate, prompts, max_tokens)
    bare_s = time.monotonic() - started

    started = time.monotonic()
    heard = await asyncio.gather(*(_hear(client, prompt, max_tokens) for prompt in prompts))
    cluster_s = time.monotonic() - started

    alone = await _hear(client, prompts[0], max_tokens)
    long_prompt = (prompts[1] * _LONG_PROMPT_TOKENS)[:_LONG_PROMPT_TOKENS]
    running = asyncio.create_task(_hear(client, prompts[2], 2 * max_tokens))
    long = asyncio.create_task(_hear(client, long_prompt, 1))
    await asyncio.sleep(0.2)  # the long prompt is being read by then
    beside = await _hear(client, prompts[0], max_tokens)
    await long
    return Round(
        bare_tokens_per_s=sum(map(len, expected)) / bare_s,
        tokens_per_s=sum(len(one.ids) for one in heard) / cluster_s,
        equal=sum(one.ids == ids for one, ids in zip(heard, expected, strict=True)),
        first_token_s=alone.first_token_s,
        gap_s=statistics.median(gap for one in heard for gap in one.gaps_s),
        first_token_beside_long_prompt_s=beside.first_token_s,
        longest_gap_beside_long_prompt_s=max((await running).gaps_s),
    )


async def _measure(folder: Path, max_tokens: int, rounds: int) -> list[Round]:
    bundle, paths = await asyncio.to_thread(open_directory, folder)
    bare = await asyncio.to_thread(Bare, folder)
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster:
            addresses = cluster.addresses
            async with AsyncClient(
                inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager
            ) as client:
                await client.push(bundle, paths, _MODEL, alias="stable")
                await client.wait_until_served(_MODEL, timeout_s=120)
                texts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in _QUESTIONS]
                tokens = await client.tokenize(_MODEL, texts, special_tokens=False)
                prompts = [ids.tolist() for ids in tokens.ids]
                await _hear(client, prompts[0], 8)
                return [await _round(client, bare, prompts, max_tokens) for _ in range(rounds)]


def main(
    json_file: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens that each stream generates at most.", min=8)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them.", min=1)] = 5,
    cache: Annotated[Path, typer.Option(help="Where the sample is kept.")] = Path(".cache/samples"),
) -> None:
    """Measure 8 streams of a local cluster against the bare engine on the sample smollm2."""
    sample, folder = find_sample(_MODEL), cache / _MODEL
    if not is_whole(sample, folder):
        fetch_sample(sample, folder)
    measured = asyncio.run(_measure(folder, max_tokens, rounds))
    ratio = statistics.median(one.tokens_per_s / one.bare_tokens_per_s for one in measured)
    name = f"Generate, {len(_QUESTIONS)} streams: tokens/s over the bare engine"
    bar = {"name": name, "value": round(ratio, 3), "goal": _GOAL, "holds": ratio >= _GOAL}
    rows = [asdict(one) for one in measured]
    console = Console()
    for row in rows:
        console.print({key: round(value, 3) for key, value in row.items()})
    console.print(bar)
    if json_file:
        json_file.write_text(json.dumps({"bars": [bar], "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
