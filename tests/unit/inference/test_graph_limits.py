"""What a text model claims is held against its graph when it is loaded: the longest text, and its token ids."""

from pathlib import Path

import numpy as np
import pytest
from harness import graphs
from harness.loading import load, running_engine
from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import InvalidBundleError
from onnx import ModelProto, helper, numpy_helper


def with_positions(rows: int, *, behind: int) -> ModelProto:
    """An embedder that adds a vector by position, of which there are `rows`; the first token's is number `behind`."""
    graph = graphs.embedder()
    graph.graph.node[-1].output[0] = "without_positions"
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((rows, graphs.DIMENSIONS), np.float32), "positions"),
            numpy_helper.from_array(np.array(1), "tokens"),
            numpy_helper.from_array(np.array(behind - 1), "offset"),
        ]
    )
    graph.graph.node.extend(
        [
            helper.make_node("CumSum", ["attention_mask", "tokens"], ["counted"]),
            helper.make_node("Add", ["counted", "offset"], ["position"]),
            helper.make_node("Gather", ["positions", "position"], ["of_position"]),
            helper.make_node("Add", ["without_positions", "of_position"], ["last_hidden_state"]),
        ]
    )
    return graph


@pytest.mark.parametrize(
    ("rows", "behind", "taken"),
    [
        pytest.param(graphs.MAX_TOKENS, 0, graphs.MAX_TOKENS, id="a position for each"),
        pytest.param(graphs.MAX_TOKENS, 2, graphs.MAX_TOKENS - 2, id="positions behind the padding, as of RoBERTa"),
        pytest.param(5, 0, 5, id="far fewer"),
        pytest.param(1, 0, 1, id="one"),
    ],
)
async def test_the_longest_text_is_what_the_graph_takes(tmp_path: Path, rows: int, behind: int, taken: int) -> None:
    async with running_engine() as engine:
        model = await load(graphs.text_bundle(with_positions(rows, behind=behind), Task.EMBED), engine, tmp_path)

        assert model.max_tokens == taken


async def test_a_graph_that_takes_no_text_at_all_is_refused(tmp_path: Path) -> None:
    sample = graphs.text_bundle(with_positions(2, behind=9), Task.EMBED)

    with pytest.raises(
        InvalidBundleError, match=r"The graph fails where the number of tokens is 1: .*out of data bounds"
    ):
        async with running_engine() as engine:
            await load(sample, engine, tmp_path)


@pytest.mark.parametrize("claimed", [None, 10, graphs.VOCABULARY_SIZE, graphs.VOCABULARY_SIZE + 7])
async def test_the_vocabulary_is_the_table_s_whatever_the_files_say(tmp_path: Path, claimed: int | None) -> None:
    sample = graphs.text_bundle(graphs.embedder(), Task.EMBED, vocabulary_size=claimed)

    async with running_engine() as engine:
        model = await load(sample, engine, tmp_path)

        assert model.vocabulary_size == graphs.VOCABULARY_SIZE


async def test_a_table_that_ids_reach_after_a_computation_is_tried(tmp_path: Path) -> None:
    sample = graphs.text_bundle(
        graphs.embedder_of_masked_ids(), Task.EMBED, vocabulary_size=graphs.VOCABULARY_SIZE + 100
    )

    async with running_engine() as engine:
        model = await load(sample, engine, tmp_path)

        assert model.vocabulary_size == graphs.VOCABULARY_SIZE
