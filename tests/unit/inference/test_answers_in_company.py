"""No answer depends on who else asked: of any graph, and with many callers at once."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from harness import graphs
from harness.company_graphs import TENSORS, TEXTS, Family
from harness.loading import load, running_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelfleet.bundle.manifest import Batching
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.engine import Engine
from modelfleet.inference.made_inputs import random_tokens
from modelfleet.inference.models import LoadedModel
from modelfleet.inference.session import RunCancellation
from modelfleet.inference.tasks import classify, tensors

CALLERS = 64
TOLERANCE = 1e-4
LIMITS = BatchLimits(max_tokens=256, min_fill=0.5)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine(max_queue_tokens=1 << 20) as engine:
        yield engine


async def ask_tensors(engine: Engine, model: LoadedModel, x: np.ndarray) -> np.ndarray:
    inputs = {"x": x}
    rows, key = tensors.check(inputs, model.session.inputs, batches=model.batches, nan=False)
    results = await engine.submit(model, inputs, [1] * rows, deadline=math.inf, key=key)
    return tensors.joined(results, ["y"])["y"]


async def many_tensors(engine: Engine, model: LoadedModel, family: Family, random: np.random.Generator) -> None:
    """Have many callers ask at once, each for one row or more; hold each answer against the session's own."""
    asked = []
    for _ in range(CALLERS):
        shape = (
            int(random.integers(1, 4)),
            *(int(random.integers(2, 5)) if size is None else size for size in family.shape),
        )
        asked.append(random.normal(size=shape).astype(np.float32) * random.choice([0, 1, 3]).astype(np.float32))
    answers = await asyncio.gather(*(ask_tensors(engine, model, x) for x in asked))
    for x, answer in zip(asked, answers, strict=True):
        parts = [x[index : index + 1] for index in range(len(x))] if model.batches else [x]
        for part, found in zip(parts, np.split(answer, len(parts)) if len(parts) > 1 else [answer], strict=True):
            (alone,) = model.session.run({"x": part}, ["y"], RunCancellation())
            np.testing.assert_allclose(found, alone, atol=TOLERANCE * max(1, np.abs(alone).max(initial=0)))
        (whole,) = model.session.run({"x": x}, ["y"], RunCancellation())
        np.testing.assert_allclose(answer, whole, atol=TOLERANCE * max(1, np.abs(whole).max(initial=0)))


async def many_texts(engine: Engine, model: Any, random: np.random.Generator) -> None:
    async def ask(lengths: list[int]) -> None:
        tokens = random_tokens(lengths, graphs.VOCABULARY_SIZE, 0, random)
        found = await engine.submit(model, tokens, lengths, deadline=math.inf)
        for index, row in enumerate(found):
            ids = tokens.ids[tokens.starts[index] : tokens.starts[index + 1]][None].astype(np.int64)
            inputs = {
                spec.name: ids if spec.name == "input_ids" else np.ones_like(ids) for spec in model.session.inputs
            }
            (logits,) = model.session.run(inputs, ["logits"], RunCancellation())
            np.testing.assert_allclose(row, classify.softmax(logits)[0], atol=TOLERANCE)

    await asyncio.gather(
        *(ask(random.integers(1, graphs.MAX_TOKENS + 1, random.integers(1, 4)).tolist()) for _ in range(CALLERS))
    )


@pytest.mark.parametrize("family", TENSORS, ids=lambda family: family.name)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
async def test_every_caller_of_a_tensor_model_gets_what_the_graph_alone_answers(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, family: Family, seed: int
) -> None:
    random = np.random.default_rng(seed)

    model = await load(family.make(random), engine, tmp_path_factory.mktemp("model"), limits=LIMITS)

    assert model.batches is family.independent, model.notes
    await many_tensors(engine, model, family, random)


@pytest.mark.parametrize("family", TEXTS, ids=lambda family: family.name)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
async def test_every_caller_of_a_text_model_gets_what_its_text_alone_is_answered(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, family: Family, seed: int
) -> None:
    random = np.random.default_rng(seed)

    model = await load(family.make(random), engine, tmp_path_factory.mktemp("model"), limits=LIMITS)

    assert (model.sharing.batching is Batching.PADDED) is family.independent, model.notes
    await many_texts(engine, model, random)
