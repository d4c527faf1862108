"""What a version's rows share is found out when it is loaded, or decided by its manifest where it cannot be."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import graphs
from harness.company_graphs import TENSORS, TEXTS
from harness.loading import load, running_engine
from modelfleet.bundle.manifest import Batching, Manifest, Task
from modelfleet.inference import self_test_runs
from modelfleet.inference.engine import Engine
from modelfleet.inference.session import Session
from modelfleet.runtime.errors import InvalidBundleError
from onnx import ModelProto, TensorProto, helper, numpy_helper

FAMILIES = {family.name: family for family in (*TENSORS, *TEXTS)}


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


def made(family: str, **manifest: object) -> graphs.SampleBundle:
    """Return a bundle of a family, with more in its manifest."""
    sample = FAMILIES[family].make(np.random.default_rng(1))
    given = sample.bundle.manifest.model_dump(exclude_defaults=True) | manifest
    return graphs.SampleBundle(
        type(sample.bundle)(sample.bundle.files, Manifest.model_validate(given)), sample.contents
    )


async def test_a_version_says_why_its_rows_run_alone(engine: Engine, tmp_path: Path) -> None:
    model = await load(made("detections"), engine, tmp_path)

    assert model.sharing.batching is Batching.ALONE
    assert model.notes == (
        "rows run alone: rows of its first axis are answered differently, or not at all, when they run together"
    )


async def test_texts_that_padding_changes_share_batches_with_texts_of_their_length_only(
    engine: Engine, tmp_path: Path
) -> None:
    model = await load(made("mean of all"), engine, tmp_path)

    assert model.sharing.batching is Batching.SAME_SHAPE
    assert (model.limits.min_fill, model.limits.free_tokens) == (1.0, 0)
    assert model.notes.startswith("only rows of equal length share batches: texts padded to one length differ")


@pytest.mark.parametrize("wanted", [Batching.SAME_SHAPE, Batching.ALONE])
async def test_a_manifest_may_ask_for_less_than_holds(engine: Engine, tmp_path: Path, wanted: Batching) -> None:
    model = await load(made("masked mean", batching=wanted), engine, tmp_path)

    assert model.sharing.batching is wanted


@pytest.mark.parametrize(
    ("family", "wanted", "why"),
    [
        ("detections", Batching.SAME_SHAPE, "rows of its first axis are answered differently"),
        ("mean of all", Batching.PADDED, "texts padded to one length differ"),
        ("mean of texts", Batching.SAME_SHAPE, "texts of the same length differ"),
        ("dense", Batching.PADDED, "such a graph lets rows share at most 'same-shape'"),
    ],
)
async def test_a_manifest_that_asks_for_more_than_holds_is_refused(
    engine: Engine, tmp_path: Path, family: str, wanted: Batching, why: str
) -> None:
    with pytest.raises(InvalidBundleError, match=f"The manifest says `batching: {wanted.value}`, but {why}"):
        await load(made(family, batching=wanted), engine, tmp_path)


async def test_a_manifest_s_tolerance_lets_rows_share_what_company_changes_a_little(
    engine: Engine, tmp_path: Path
) -> None:
    model = await load(made("mean of all", batching_tolerance=2.0), engine, tmp_path)

    assert model.sharing.batching is Batching.PADDED
    assert model.sharing.deviation > 0.005
    assert model.notes == f"company changes answers by up to {model.sharing.deviation:.2g} of their magnitude"


def of_certain_words() -> ModelProto:
    """y = the column of x that x's own first number tells: nothing that is made up is such a number."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["numbers"], to=TensorProto.INT64),
            helper.make_node("Gather", ["numbers", "first"], ["number"], axis=1),
            helper.make_node("Sub", ["number", "beyond"], ["index"]),
            helper.make_node("GatherElements", ["x", "index"], ["y"], axis=1),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [
            numpy_helper.from_array(np.array([0]), "first"),
            numpy_helper.from_array(np.array([[900]]), "beyond"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(("manifest", "batches"), [({}, False), ({"batching": "same-shape"}, True)])
async def test_where_nothing_can_be_found_out_rows_run_alone_unless_the_manifest_says_otherwise(
    engine: Engine, tmp_path: Path, manifest: dict[str, object], *, batches: bool
) -> None:
    model = await load(graphs.tensor_bundle(of_certain_words(), **manifest), engine, tmp_path)

    assert model.batches is batches
    assert "the graph took, or told apart, none of the inputs that were made up" in model.sharing.reason


def quantized_classifier() -> ModelProto:
    """Logits of the masked mean by int8, whose scale is that of the whole batch."""
    graph = graphs.classifier()
    graph.graph.node[-1].output[0] = "exact"
    graph.graph.node[-1].op_type = "Identity"
    graph.graph.node.extend(
        [
            helper.make_node("DynamicQuantizeLinear", ["exact"], ["bytes", "scale", "zero_point"]),
            helper.make_node("DequantizeLinear", ["bytes", "scale", "zero_point"], ["logits"]),
        ]
    )
    return graph


async def test_what_quantization_changes_by_construction_is_measured_and_told(engine: Engine, tmp_path: Path) -> None:
    model = await load(graphs.text_bundle(quantized_classifier(), Task.CLASSIFY), engine, tmp_path)

    assert model.sharing.batching is Batching.PADDED
    assert 1e-4 < model.sharing.deviation < 0.1


def fixed(graph: ModelProto, rows: int | str, tokens: int | str) -> ModelProto:
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension, size in zip(value.type.tensor_type.shape.dim, (rows, tokens), strict=False):
            dimension.Clear()
            if isinstance(size, int):
                dimension.dim_value = size
            else:
                dimension.dim_param = size
    return graph


@pytest.mark.parametrize(
    ("rows", "tokens", "batching", "max_rows"),
    [
        ("batch", 8, Batching.PADDED, 64 // 8),
        (1, "tokens", Batching.ALONE, 1),
        (1, 8, Batching.ALONE, 1),
        (4, "tokens", Batching.PADDED, 4),
        (4, 8, Batching.PADDED, 4),
    ],
)
async def test_fixed_axes_are_filled_up(
    tmp_path: Path, rows: int | str, tokens: int | str, batching: Batching, max_rows: int
) -> None:
    graph = fixed(graphs.labeller(), rows, tokens)
    async with running_engine() as engine:
        model = await load(graphs.text_bundle(graph, Task.ENTITIES), engine, tmp_path)

    assert (model.sharing.batching, model.limits.max_rows) == (batching, max_rows)
    assert model.max_tokens == (8 if tokens == 8 else graphs.MAX_TOKENS)


async def test_a_model_whose_rows_take_too_long_together_is_served_row_by_row(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run

    def slow(self: Session, inputs: Any, *more: Any) -> Any:
        time.sleep(0.15 * len(next(iter(inputs.values()))))
        return run(self, inputs, *more)

    monkeypatch.setattr(Session, "run", slow)
    monkeypatch.setattr(self_test_runs, "_LONGEST_RUN_S", 0.6)

    model = await load(made("dense"), engine, tmp_path)

    assert model.sharing.batching is Batching.ALONE
    assert "or not at all, when they run together" in model.notes
