"""Texts to token ids and back, with a real manager and a real tokenizer service."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.bundle_graphs import write_graph
from harness.callers import Caller
from harness.manager import running_manager
from harness.small_tokenizers import wordpiece_json
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import InvalidInputError, ModelNotFoundError
from modelfleet.tokenizer.__main__ import Settings, tokenizing


@pytest.fixture(params=[False, True], ids=["threads", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
async def targets(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    folder = tmp_path / "model"
    write_graph(folder / "model.onnx")
    (folder / "tokenizer.json").write_bytes(wordpiece_json())
    (folder / "modelfleet.yaml").write_text("task: embed\nmax_tokens: 16\ntokenizer: tokenizer.json\n")
    async with running_manager(tmp_path / "data") as manager:
        settings = Settings(host="127.0.0.1", port=0, manager=manager.address, cache_dir=tmp_path / "cache")
        async with tokenizing(settings.model_copy(update={"drain_delay_s": 0})) as server:
            targets = {"manager": manager.address, "tokenizer": f"127.0.0.1:{server.port}"}
            async with AsyncClient(**targets) as client:
                await client.push(*open_directory(folder), "m", alias="stable")
            yield targets


async def test_texts_are_encoded_and_decoded(call: Caller, targets: dict[str, str]) -> None:
    tokens = await call(targets, "tokenize", "m", ["the cat", "mat"], with_offsets=True)
    texts = await call(targets, "detokenize", "m", tokens.ids)

    assert [len(ids) for ids in tokens.ids] == [4, 3]
    assert tokens.offsets[0].tolist() == [[0, 0], [0, 3], [4, 7], [0, 0]]
    assert (tokens.window_counts.tolist(), tokens.token_counts.tolist()) == ([1, 1], [4, 3])
    assert texts == ["the cat", "mat"]


async def test_special_tokens_and_offsets_may_be_left_out(call: Caller, targets: dict[str, str]) -> None:
    tokens = await call(targets, "tokenize", "m", ["the cat"], special_tokens=False)

    assert (len(tokens.ids[0]), tokens.offsets) == (2, ())


async def test_pairs_tell_their_halves(call: Caller, targets: dict[str, str]) -> None:
    tokens = await call(targets, "tokenize", "m", ["the cat"], ["mat"])
    single = await call(targets, "tokenize", "m", ["the cat"])

    assert tokens.type_ids[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert single.type_ids[0].tolist() == [0, 0, 0, 0]


async def test_windows_cover_a_long_text(call: Caller, targets: dict[str, str]) -> None:
    tokens = await call(targets, "tokenize", "m", ["the cat sat on the mat", "cat"], max_tokens=5, window_stride=1)

    assert tokens.window_counts.tolist() == [3, 1]
    assert max(len(ids) for ids in tokens.ids) == 5
    assert tokens.token_counts.tolist() == [8, 3]


@pytest.mark.parametrize("texts", ["the cat", [1]])
async def test_what_are_no_texts_is_refused(call: Caller, targets: dict[str, str], texts: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="texts"):
        await call(targets, "tokenize", "m", texts)


async def test_ids_outside_of_the_vocabulary_are_refused(call: Caller, targets: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match="99999"):
        await call(targets, "detokenize", "m", [[99999]])
    with pytest.raises(InvalidInputError, match="list of integers"):
        await call(targets, "detokenize", "m", [["a"]])


async def test_an_unknown_model_is_told(call: Caller, targets: dict[str, str]) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        await call(targets, "tokenize", "absent", ["the cat"])
