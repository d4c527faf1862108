"""What a version must show before it is READY: golden examples, the largest batch, and that it fits into memory."""

import asyncio
import gc
import math
import re
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import graphs
from harness.golden import affine_example, with_golden
from harness.loading import load, running_engine
from modelfleet.bundle.golden import GoldenExample
from modelfleet.bundle.manifest import Task
from modelfleet.inference import loading
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.engine import Engine
from modelfleet.inference.session import Session
from modelfleet.runtime.errors import GoldenMismatchError, InsufficientMemoryError, InvalidBundleError
from modelfleet.runtime.memory import resident_memory, return_free_memory
from onnx import ModelProto, TensorProto, helper, numpy_helper

MEGABYTE = 1_000_000


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


@pytest.fixture
def shapes_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the first input of each run."""
    shapes: list[tuple[int, ...]] = []
    run = Session.run

    def watched(self: Session, inputs: Any, *more: Any) -> Any:
        shapes.append(next(iter(inputs.values())).shape)
        return run(self, inputs, *more)

    monkeypatch.setattr(Session, "run", watched)
    return shapes


def taken() -> int:
    """What earlier tests have left behind is no part of it."""
    gc.collect()  # tracebacks of what was refused
    return_free_memory()
    return resident_memory()


async def test_a_model_that_gives_what_was_recorded_is_loaded(engine: Engine, tmp_path: Path) -> None:
    sample = with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, affine_example())

    model = await load(sample, engine, tmp_path)

    assert model.canary
    assert model.canary.difference(await model.canary.trial.run(model, engine)) == 0
    assert model.record.success.count == 0  # what the worker asks itself is no traffic


async def test_a_mismatch_names_the_example_the_largest_difference_and_the_provider(
    engine: Engine, tmp_path: Path
) -> None:
    sample = with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, affine_example(off_by=0.5))

    with pytest.raises(GoldenMismatchError) as caught:
        await load(sample, engine, tmp_path)

    assert caught.value.message.startswith(
        "m@2 on CPUExecutionProvider differs from the golden example 'first': output 'y' by 0.333 of its largest"
    )


async def test_the_manifest_s_tolerance_holds(engine: Engine, tmp_path: Path) -> None:
    bundle = graphs.tensor_bundle(graphs.affine(), golden_tolerance=0.4)

    await load(with_golden(bundle, tmp_path, affine_example(off_by=0.5)), engine, tmp_path)


async def test_an_example_that_the_graph_cannot_run_is_a_mismatch(engine: Engine, tmp_path: Path) -> None:
    wrong = GoldenExample("wrong", {"x": np.zeros((1, 7), np.float32)}, {"y": np.zeros((1, 7), np.float32)})

    with pytest.raises(GoldenMismatchError, match=r"fails on the golden example 'wrong': .*Got: 7 Expected: 3"):
        await load(with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, wrong), engine, tmp_path)


async def test_a_text_model_is_held_to_its_graph_s_raw_outputs(engine: Engine, tmp_path: Path) -> None:
    ids = np.array([[2, 30, 31, 3]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    right = graphs.ENTITY_LOGITS[ids]
    wrong = np.where(np.abs(right) == np.abs(right).max(), 0, right)
    bundle = graphs.text_bundle(graphs.labeller(), Task.ENTITIES)

    await load(
        with_golden(bundle, tmp_path, GoldenExample("cat", inputs, {"logits": right})), engine, tmp_path / "right"
    )
    with pytest.raises(GoldenMismatchError, match="output 'logits' by 1"):
        await load(
            with_golden(bundle, tmp_path, GoldenExample("cat", inputs, {"logits": wrong})), engine, tmp_path / "wrong"
        )


async def test_a_text_model_is_warmed_up_to_its_largest_batch(
    engine: Engine, tmp_path: Path, shapes_run: list[tuple[int, ...]]
) -> None:
    await load(
        graphs.text_bundle(graphs.embedder(), Task.EMBED), engine, tmp_path, limits=BatchLimits(8 * graphs.MAX_TOKENS)
    )

    longest = graphs.MAX_TOKENS
    assert {(1, longest), (2, longest), (4, longest), (8, longest)} <= set(shapes_run)
    assert (16, longest) not in shapes_run
    assert shapes_run[-2:] == [(1, 4)] * 2  # the canary, twice


async def test_a_tensor_model_is_warmed_up_by_its_examples_to_its_largest_batch(
    engine: Engine, tmp_path: Path, shapes_run: list[tuple[int, ...]]
) -> None:
    bundle = graphs.tensor_bundle(graphs.affine(), max_batch_rows=12)

    model = await load(with_golden(bundle, tmp_path, affine_example(rows=2)), engine, tmp_path)

    assert shapes_run[0] == (2, 3)  # the golden example itself
    assert shapes_run[-7:] == [(1, 3), (2, 3), (4, 3), (8, 3), (12, 3), (2, 3), (2, 3)]
    assert model.limits.max_tokens == 12


async def test_a_batch_of_large_elements_holds_no_more_than_a_message(engine: Engine, tmp_path: Path) -> None:
    large = np.zeros((1, 4_000_000), np.float32)
    graph = tensor_graph(
        [helper.make_node("ReduceMax", ["x", "axis"], ["y"], keepdims=1)],
        ["batch", 4_000_000],
        axis=np.array([1], np.int64),
    )
    sample = with_golden(
        graphs.tensor_bundle(graph), tmp_path, GoldenExample("large", {"x": large}, {"y": large[:, :1]})
    )

    model = await load(sample, engine, tmp_path)

    assert model.limits.max_tokens == (64 << 20) // large.nbytes


async def test_a_tensor_model_without_examples_is_warmed_up_and_watched_by_zeros_of_its_shapes(
    engine: Engine, tmp_path: Path, shapes_run: list[tuple[int, ...]]
) -> None:
    model = await load(graphs.tensor_bundle(graphs.affine(), max_batch_rows=12), engine, tmp_path)

    assert shapes_run[-7:] == [(1, 3), (2, 3), (4, 3), (8, 3), (12, 3), (1, 3), (1, 3)]
    assert model.canary
    assert [answer.tolist() for answer in model.canary.expected] == [[[1, 1, 1]]]
    assert model.unwatched == ""


@pytest.mark.parametrize(
    ("graph", "shape"),
    [
        pytest.param(graphs.fixed_batch(), (2, 3), id="a fixed first dimension"),
        pytest.param(graphs.echo(TensorProto.STRING), (1, 2), id="strings"),
        pytest.param(graphs.echo(TensorProto.BOOL), (1, 2), id="truth values"),
    ],
)
async def test_zeros_are_of_the_input_s_shape_and_dtype(
    engine: Engine, tmp_path: Path, graph: ModelProto, shape: tuple[int, ...], shapes_run: list[tuple[int, ...]]
) -> None:
    model = await load(graphs.tensor_bundle(graph), engine, tmp_path)

    assert shapes_run[-1] == shape
    assert model.canary


def of_any_width() -> ModelProto:
    return tensor_graph([helper.make_node("Identity", ["x"], ["y"])], ["batch", "width"])


def of_no_zeros() -> ModelProto:
    """y = the column of x that x's own first number tells, counted from 1."""
    return tensor_graph(
        [
            helper.make_node("Cast", ["x"], ["numbers"], to=TensorProto.INT64),
            helper.make_node("Gather", ["numbers", "first"], ["number"], axis=1),
            helper.make_node("Sub", ["number", "beyond"], ["index"]),
            helper.make_node("GatherElements", ["x", "index"], ["y"], axis=1),
        ],
        ["batch", 3],
        first=np.array([0], np.int64),
        beyond=np.array([[9]], np.int64),
    )


def of_chance() -> ModelProto:
    return tensor_graph([helper.make_node("RandomNormalLike", ["x"], ["y"])], ["batch", 3])


@pytest.mark.parametrize(
    ("make_graph", "why"),
    [
        (
            of_no_zeros,
            r"made-up inputs do not show what it does: The graph fails on 1 rows: .*Out of range value in .*",
        ),
        (of_chance, r"made-up inputs do not show what it does: The graph answers 1 rows anew each time, by .*"),
    ],
)
async def test_a_tensor_model_that_nothing_can_be_asked_says_so_and_is_served(
    engine: Engine, tmp_path: Path, make_graph: Callable[[], ModelProto], why: str
) -> None:
    model = await load(graphs.tensor_bundle(make_graph()), engine, tmp_path)

    assert model.canary is None
    described = (
        rf"neither warmed up nor watched: it has no golden examples, and {why}\. Record some with `modelfleet .*"
    )
    assert re.fullmatch(described, model.unwatched)
    ((answer,),) = await engine.submit(model, {"x": np.full((1, 3), 9, np.float32)}, [1], deadline=math.inf)
    assert len(answer) == 1


async def test_a_tensor_model_of_any_shape_is_watched_by_made_up_inputs(engine: Engine, tmp_path: Path) -> None:
    model = await load(graphs.tensor_bundle(of_any_width()), engine, tmp_path)

    assert model.canary
    assert model.unwatched == ""


async def test_a_text_model_that_answers_anew_each_time_is_refused(engine: Engine, tmp_path: Path) -> None:
    noisy = graphs.embedder()
    noisy.graph.node[-1].output[0] = "quiet"
    noisy.graph.node.append(helper.make_node("RandomNormalLike", ["quiet"], ["noise"]))
    noisy.graph.node.append(helper.make_node("Add", ["quiet", "noise"], ["last_hidden_state"]))

    with pytest.raises(InvalidBundleError, match=r"answers 1 rows of 4 tokens anew each time, by \d"):
        await load(graphs.text_bundle(noisy, Task.EMBED), engine, tmp_path)


@pytest.mark.parametrize(
    "sample",
    [
        graphs.tensor_bundle(graphs.large(4 * MEGABYTE)),
        graphs.text_bundle(graphs.large(4 * MEGABYTE), Task.GENERATE),
    ],
    ids=["tensor", "generate"],
)
async def test_a_version_too_large_for_what_is_left_is_refused_before_it_is_loaded_with_the_figures(
    engine: Engine, tmp_path: Path, sample: graphs.SampleBundle
) -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        await load(sample, engine, tmp_path, host_bytes=taken() + 3 * MEGABYTE)

    assert "m@2 needs about 6 MB of host memory to be loaded, and " in caught.value.message
    assert "MB are left on this worker" in caught.value.message


async def test_a_version_whose_largest_batch_would_not_fit_is_refused_before_that_is_run(
    engine: Engine, tmp_path: Path, shapes_run: list[tuple[int, ...]]
) -> None:
    # Each row takes 4 MB on its way.
    graph = tensor_graph(
        [
            helper.make_node("Expand", ["x", "width"], ["wide"]),
            helper.make_node("Exp", ["wide"], ["wider"]),
            helper.make_node("ReduceMax", ["wider", "axis"], ["y"], keepdims=1),
        ],
        ["batch", 1],
        width=np.array([1, MEGABYTE], np.int64),
        axis=np.array([1], np.int64),
    )
    one = np.zeros((1, 1), np.float32)
    sample = with_golden(
        graphs.tensor_bundle(graph, max_batch_rows=48), tmp_path, GoldenExample("one", {"x": one}, {"y": one + 1})
    )

    with pytest.raises(InsufficientMemoryError, match=r"m@2 .*(to run|after) \d+ rows at once.* MB"):
        await load(sample, engine, tmp_path, host_bytes=taken() + 150 * MEGABYTE)

    assert (48, 1) not in shapes_run
    model = await load(sample, engine, tmp_path / "again")
    assert model.memory.host_peak_bytes > 150 * MEGABYTE


async def test_a_version_that_took_more_than_there_is_is_refused_with_the_figures(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = AtOnce(**vars(graphs.tensor_bundle(graphs.large(40 * MEGABYTE))))

    monkeypatch.setattr(loading, "_LOADING_SHARE", 0)
    with pytest.raises(InsufficientMemoryError) as caught:
        await load(sample, engine, tmp_path, host_bytes=taken() + 10 * MEGABYTE)

    assert re.match(
        r"m@2 does not fit: once it is loaded, this worker takes \d+ MB more than its \d+ MB of host memory\.",
        caught.value.message,
    )


async def test_unloading_gives_back_what_loading_took(engine: Engine, tmp_path: Path) -> None:
    size = 40 * MEGABYTE
    sample = AtOnce(**vars(graphs.tensor_bundle(graphs.large(size))))
    before = taken()

    model = await load(sample, engine, tmp_path)
    loaded = taken() - before
    engine.detach(model)
    host_bytes = model.memory.host_bytes
    alive = weakref.ref(model)
    del model
    async with asyncio.timeout(5):
        while alive():  # noqa: ASYNC110  the loop holds the future of the call that loaded it for a few turns more
            await asyncio.sleep(0)

    assert loaded > 0.9 * size
    assert host_bytes > 0.9 * size
    assert taken() - before < 0.2 * size


class AtOnce(graphs.SampleBundle):
    """Downloads in one piece."""

    async def download(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        yield self.contents[sha256][offset:]


def tensor_graph(nodes: list[object], shape: list[int | str], **constants: np.ndarray) -> ModelProto:
    """x: float `shape` -> y."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
