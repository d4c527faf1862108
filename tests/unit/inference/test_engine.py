import asyncio
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
import pytest
from harness import graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfleet.bundle.manifest import Task
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import RowsFailedError
from modelfleet.inference.models import TensorModel, TextModel
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    DrainingError,
    InvalidInputError,
    ModelLoadingError,
    OverloadedError,
)

FOR_EVER = 1e12  # matrix products: ends by cancellation only
ONE_ROW = BatchLimits(max_tokens=1)


class Watched(TensorModel):
    """A tensor model that tells how many rows it runs, when it starts to."""

    def watch(self, ran: "asyncio.Queue[tuple[str, int]]") -> "Watched":
        self._tell: Callable[[int], object] = lambda rows: loop.call_soon_threadsafe(ran.put_nowait, (self.name, rows))
        loop = asyncio.get_running_loop()
        return self

    def run(self, inputs: Any, cancellation: Any) -> Any:
        self._tell(len(inputs["x"]))
        return super().run(inputs, cancellation)


Ran = asyncio.Queue[tuple[str, int]]


def slow_model(directory: Path, ran: Ran, *, name: str = "slow@1", limits: BatchLimits = graphs.LIMITS) -> Watched:
    loaded = graphs.load(graphs.tensor_bundle(graphs.slow()), directory, name=name, limits=limits)
    watched = Watched(loaded.name, loaded.manifest, loaded.session, loaded.limits).watch(ran)
    watched.sharing = loaded.sharing
    return watched


@asynccontextmanager
async def running_engine(*models: Any, lanes: int = 1, max_queue_tokens: int = 1000) -> AsyncIterator[Engine]:
    engine = Engine(lanes, max_queue_tokens)
    for model in models:
        engine.attach(model)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def start(engine: Engine, model: Any, *products: float, deadline: float = math.inf) -> "asyncio.Task[list[Any]]":
    """Submit rows that take so many matrix products each."""
    rows = np.array(products, np.float32)[:, None]
    return asyncio.create_task(engine.submit(model, {"x": rows}, [1] * len(rows), deadline=deadline))


async def submitted() -> None:
    """Let tasks that were just made submit."""
    await asyncio.sleep(0)


@contextmanager
def cancelled(*tasks: "asyncio.Task[Any]") -> Iterator[None]:
    """Cancel what runs for ever when the block ends, so that a failed test ends too."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def answers(results: Sequence[Sequence[np.ndarray]]) -> list[float]:
    return [float(y[0, 0]) for (y,) in results]


def tokens(*texts: Sequence[int]) -> Tokens:
    counts = np.array([len(text) for text in texts], np.int32)
    ids = np.concatenate([np.array(text, np.int32) for text in texts])
    return Tokens.whole(ids, counts)


async def embed(engine: Engine, model: TextModel, *texts: Sequence[int], deadline: float = math.inf) -> np.ndarray:
    return np.stack(await engine.submit(model, tokens(*texts), [len(text) for text in texts], deadline=deadline))


@pytest.fixture
def embedder(tmp_path: Path) -> TextModel:
    # Like a bundle whose config says no vocabulary size: only the session finds ids outside of it.
    loaded = graphs.load(graphs.text_bundle(graphs.embedder(), Task.EMBED, vocabulary_size=None), tmp_path)
    assert isinstance(loaded, TextModel)
    return loaded


def naive(text: Sequence[int]) -> np.ndarray:
    return 2 * graphs.VECTORS[list(text)].mean(axis=0)


ids = st.integers(0, graphs.VOCABULARY_SIZE - 1)
texts = st.lists(ids, min_size=1, max_size=graphs.MAX_TOKENS)


@given(
    requests=st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=6),
    max_tokens=st.integers(1, 200),
    lanes=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
async def test_results_are_the_same_whatever_the_batch(
    tmp_path_factory: pytest.TempPathFactory, requests: list[list[list[int]]], max_tokens: int, lanes: int
) -> None:
    sample = graphs.text_bundle(graphs.embedder(), Task.EMBED)
    model = graphs.load(sample, tmp_path_factory.mktemp("m"), limits=BatchLimits(max_tokens, min_fill=0.0))
    async with running_engine(model, lanes=lanes) as engine:
        results = await asyncio.gather(*(embed(engine, model, *request) for request in requests))
    for request, vectors in zip(requests, results, strict=True):
        np.testing.assert_allclose(vectors, [naive(text) for text in request], atol=1e-5)


async def test_rows_that_arrive_while_the_engine_is_busy_share_a_batch(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        first = start(engine, model, 1000)
        await ran.get()
        others = [start(engine, model, n) for n in (1, 2, 3)]
        await asyncio.gather(first, *others)
    assert ran.get_nowait() == ("slow@1", 3)
    assert ran.empty()


async def test_rows_with_other_keys_do_not_share_a_batch(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        first = start(engine, model, 1000)
        await ran.get()
        x = {"x": np.ones((1, 1), np.float32)}
        await asyncio.gather(first, *(engine.submit(model, x, [1], deadline=math.inf, key=key) for key in "ab"))
    assert [ran.get_nowait()[1] for _ in range(2)] == [1, 1]


async def test_requests_to_a_graph_of_fixed_size_that_wait_together_run_one_by_one(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    slow = slow_model(tmp_path, ran)
    fixed = graphs.load(graphs.tensor_bundle(graphs.fixed_batch()), tmp_path, name="fixed@1")
    async with running_engine(slow, fixed) as engine:
        blocker = start(engine, slow, FOR_EVER)
        with cancelled(blocker):
            await ran.get()
            inputs = [{"x": np.full((2, 3), number, np.float32)} for number in range(6)]
            requests = [asyncio.create_task(engine.submit(fixed, x, [1], deadline=math.inf)) for x in inputs]
            await submitted()
            assert queue_rows(fixed) == 6
        results = await asyncio.gather(*requests)
    assert [y.tolist() for ((y,),) in results] == [[[number] * 3] for number in range(6)]


async def test_a_full_queue_refuses_at_once_and_takes_more_when_it_has_room(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model, max_queue_tokens=3) as engine:
        blocker = start(engine, model, FOR_EVER)
        with cancelled(blocker):
            await ran.get()
            waiting = start(engine, model, 1, 2)
            await submitted()
            with pytest.raises(OverloadedError, match=r"holds 2 tokens and takes at most 3; this request has 2"):
                await start(engine, model, 1, 1)
            assert not waiting.done()
        assert answers(await waiting) == [1, 2]
        assert answers(await start(engine, model, 1, 1)) == [1, 1]


async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model, max_queue_tokens=3) as engine:
        assert answers(await start(engine, model, 5, 4, 3, 2, 1)) == [5, 4, 3, 2, 1]


async def test_a_request_that_expires_in_the_queue_never_runs(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        blocker = start(engine, model, FOR_EVER)
        with cancelled(blocker):
            await ran.get()
            deadline = time.monotonic() + 0.02
            expiring = start(engine, model, 1, deadline=deadline)
            patient = start(engine, model, 2)
            await asyncio.sleep(deadline - time.monotonic())
        with pytest.raises(DeadlineExpiredError, match=r"deadline passed after 0\.0\d\d s in the queue"):
            await expiring
        assert answers(await patient) == [2]
    assert ran.get_nowait() == ("slow@1", 1)  # the patient one, alone
    assert ran.empty()
    assert (model.record.fail.count, model.record.success.count) == (1, 1)


async def test_cancelling_the_last_caller_stops_its_batch_and_the_engine_goes_on(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        callers = [start(engine, model, FOR_EVER, deadline=time.monotonic() + 60) for _ in range(2)]
        with cancelled(*callers):
            await ran.get()
        assert answers(await start(engine, model, 3)) == [3]
    assert model.record.fail.count == 0  # it was stopped, it did not fail


async def give_up_at_the_deadline(engine: Engine, model: Any, *products: float) -> None:
    """Submit rows and leave when their deadline comes, as a call that gRPC ends then."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await start(engine, model, *products, deadline=time.monotonic() + 0.05)


async def test_a_request_that_runs_past_its_deadline_is_a_fault_of_the_version(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        await give_up_at_the_deadline(engine, model, FOR_EVER)
        await start(engine, model, 1)
    record = model.record
    assert (record.fail.count, record.faults, record.success.count) == (1, 1, 1)
    assert sum(record.latency_counts) == 2


async def test_a_request_that_waits_past_its_deadline_failed_through_no_fault_of_the_version(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran, limits=ONE_ROW)
    async with running_engine(model) as engine:
        await give_up_at_the_deadline(engine, model, FOR_EVER, 1)
        await start(engine, model, 1)
    record = model.record
    assert (record.fail.count, record.faults, record.success.count) == (1, 0, 1)


async def test_a_batch_goes_on_while_one_caller_is_left(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        first = start(engine, model, 1000)
        await ran.get()
        leaving, staying = start(engine, model, 10_000), start(engine, model, 1)
        assert await ran.get() == ("slow@1", 2)
        leaving.cancel()
        assert answers(await staying) == [1]
        await first


async def test_cancelling_a_caller_in_the_queue_drops_its_rows(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        blocker = start(engine, model, FOR_EVER)
        with cancelled(blocker):
            await ran.get()
            leaving, staying = start(engine, model, 1, 1), start(engine, model, 2)
            await submitted()
            assert queue_rows(model) == 3
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving
            assert queue_rows(model) == 1
        await staying
    assert ran.get_nowait() == ("slow@1", 1)


def queue_rows(model: Any) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value("modelfleet_queue_rows", {"model": model.name})


async def test_a_bad_row_fails_alone(embedder: TextModel) -> None:
    async with running_engine(embedder) as engine:
        good, bad, also_good = await asyncio.gather(
            embed(engine, embedder, [1, 2], [3]),
            embed(engine, embedder, [4], [graphs.VOCABULARY_SIZE]),
            embed(engine, embedder, [5]),
            return_exceptions=True,
        )
        assert isinstance(bad, RowsFailedError)
        assert {row: type(error) for row, error in bad.errors.items()} == {1: InvalidInputError}
        assert "graph of m@1 cannot compute with the tokens" in bad.first.message
        np.testing.assert_allclose(bad.results[0], naive([4]), atol=1e-5)
        np.testing.assert_allclose(good, [naive([1, 2]), naive([3])], atol=1e-5)
        np.testing.assert_allclose(also_good, [naive([5])], atol=1e-5)
        np.testing.assert_allclose(await embed(engine, embedder, [6]), [naive([6])], atol=1e-5)


async def test_a_request_with_a_bad_row_in_one_of_its_batches_fails_once_and_whole(tmp_path: Path) -> None:
    sample = graphs.text_bundle(graphs.embedder(), Task.EMBED, vocabulary_size=None)
    model = graphs.load(sample, tmp_path, limits=BatchLimits(max_tokens=1, min_fill=0.0))
    async with running_engine(model) as engine:
        with pytest.raises(RowsFailedError) as caught:
            await embed(engine, model, [graphs.VOCABULARY_SIZE], [1], [2], [graphs.VOCABULARY_SIZE])
        assert list(caught.value.errors) == [0, 3]
        np.testing.assert_allclose(await embed(engine, model, [1]), [naive([1])], atol=1e-5)
    assert (model.record.fail.count, model.record.success.count) == (1, 1)


@pytest.mark.parametrize(("self_tested", "faults"), [(False, 1), (True, 0)])
async def test_values_that_a_graph_refuses_count_against_a_version_that_has_shown_nothing_yet(
    tmp_path: Path, *, self_tested: bool, faults: int
) -> None:
    model = graphs.load(graphs.tensor_bundle(graphs.chooser()), tmp_path)
    model.self_tested = self_tested
    async with running_engine(model) as engine:
        with pytest.raises(RowsFailedError, match="graph of m@1 cannot compute with the values"):
            await engine.submit(model, {"x": np.array([graphs.VOCABULARY_SIZE])}, [1], deadline=math.inf)
        ((y,),) = await engine.submit(model, {"x": np.array([3])}, [1], deadline=math.inf)
    np.testing.assert_array_equal(y, graphs.VECTORS[[3]])
    assert (model.record.fail.count, model.record.faults) == (1, faults)


async def test_a_batch_that_returns_too_few_rows_is_run_row_by_row(tmp_path: Path, embedder: TextModel) -> None:
    sample = graphs.text_bundle(graphs.text_model_of_wrong_batch(), Task.EMBED)
    broken = graphs.load(sample, tmp_path, name="broken@1")
    async with running_engine(broken, embedder) as engine:
        vectors = await embed(engine, broken, [1], [2])
        np.testing.assert_allclose(vectors, graphs.VECTORS[[1, 2]], atol=1e-5)
        await embed(engine, embedder, [1])


async def test_models_on_a_device_take_turns(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    first, second = (slow_model(tmp_path, ran, name=name, limits=ONE_ROW) for name in ("first@1", "second@1"))
    async with running_engine(first, second) as engine:
        blocker = start(engine, first, FOR_EVER)
        with cancelled(blocker):
            await ran.get()
            requests = [start(engine, model, 1, 1, 1) for model in (first, second)]
            await submitted()
        await asyncio.gather(*requests)
    assert [ran.get_nowait()[0] for _ in range(6)] == ["second@1", "first@1"] * 3


async def test_one_request_fills_all_lanes(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran, limits=ONE_ROW)
    async with running_engine(model, lanes=2) as engine:
        request = start(engine, model, FOR_EVER, FOR_EVER)
        with cancelled(request):
            for _ in range(2):
                await asyncio.wait_for(ran.get(), 5)


async def test_closing_ends_the_threads_and_answers_who_waits(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran)
    async with running_engine(model) as engine:
        running = start(engine, model, 30_000)  # about 0.3 s
        await ran.get()
        waiting = start(engine, model, 1)
        await submitted()
    assert answers(await running) == [30_000]
    with pytest.raises(DrainingError, match="shutting down"):
        await waiting
    with pytest.raises(DrainingError):
        await start(engine, model, 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


async def test_a_model_without_a_place_is_being_unloaded(embedder: TextModel) -> None:
    async with running_engine(embedder) as engine:
        engine.detach(embedder)
        with pytest.raises(ModelLoadingError, match="m@1 is being unloaded"):
            await embed(engine, embedder, [1])


async def test_what_has_been_answered_is_not_kept(embedder: TextModel) -> None:
    class Payload(Tokens):
        """Like its base, which has no room for weak references."""

    freed = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running_engine(embedder) as engine:
        one = tokens([1])
        payload = Payload(one.ids, one.lengths, None, None, one.window_counts, one.token_counts)
        weakref.finalize(payload, loop.call_soon_threadsafe, freed.set)
        await engine.submit(embedder, payload, [1], deadline=math.inf)
        del payload
        await asyncio.wait_for(freed.wait(), 5)


async def test_batches_and_requests_are_recorded(tmp_path: Path) -> None:
    ran: Ran = asyncio.Queue()
    model = slow_model(tmp_path, ran, limits=BatchLimits(max_tokens=2))
    async with running_engine(model) as engine:
        await start(engine, model, 1, 2, 3)
    record = model.record
    assert (record.success.count, record.fail.count, record.rows) == (1, 0, 3)
    assert {rows: batch.run.count for rows, batch in record.batches.items()} == {2: 1, 1: 1}
    assert 0 < record.run.total_s <= record.success.total_s
    assert record.queue.total_s <= record.success.total_s
