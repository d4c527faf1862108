"""A worker while something it needs is away, while it is busy, and while it stops."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import pytest
from grpc import StatusCode
from harness import graphs
from harness.serving import serving
from harness.worker import Worker, refused, running_manager, running_tokenizer, running_worker, still_embeds
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.oip.v2 import open_inference_pb2 as oip
from modelfleet.api.oip.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelfleet.api.tokenizer.v1 import tokenizer_pb2_grpc
from modelfleet.bundle.manifest import Task
from modelfleet.inference.__main__ import Settings, working
from modelfleet.inference.agent import Agent
from modelfleet.runtime.errors import (
    ManagerUnreachableError,
    ModelLoadingError,
    OverloadedError,
    TokenizerUnreachableError,
)

EMBEDDER = graphs.text_bundle(graphs.embedder(), Task.EMBED)
MODELS = {
    "embedder@1": EMBEDDER,
    "affine@1": graphs.tensor_bundle(graphs.affine()),
    "slow@1": graphs.tensor_bundle(graphs.slow()),
}
EMBED = pb.EmbedRequest(model="embedder", texts=["the cat"])
DEADLINE_S = 10.0
FOR_EVER = 1e12  # matrix products: ends by cancellation only


def slow(*products: float) -> oip.ModelInferRequest:
    """Ask for rows that take so many matrix products each."""
    message = oip.ModelInferRequest(model_name="slow")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[len(products), 1])
    tensor.contents.fp32_contents.extend(products)
    return message


def affine() -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name="affine")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
    return message


async def infer(worker: Worker, *products: float) -> list[float]:
    answer = await worker.open_inference.ModelInfer(slow(*products))
    return list(answer.outputs[0].contents.fp32_contents)


async def running(worker: Worker, *products: float) -> "asyncio.Task[list[float]]":
    """Send a request, and return once it runs."""
    before = requests_begun()
    task = asyncio.create_task(infer(worker, *products))
    async with asyncio.timeout(DEADLINE_S):
        while requests_begun() == before:  # noqa: ASYNC110  the engine tells of it only when asked
            await asyncio.sleep(0.005)
    return task


def requests_begun() -> float | None:
    """Requests of this process that the engine has begun to run."""
    return prometheus_client.REGISTRY.get_sample_value("modelfleet_stage_seconds_count", {"stage": "queue"})


async def within_deadline(call: Awaitable[Any]) -> Any:
    started = time.monotonic()
    result = await call
    assert time.monotonic() - started < DEADLINE_S
    return result


@pytest.mark.slow
async def test_while_the_tokenizer_is_away_texts_are_unavailable_and_token_ids_are_not(tmp_path: Path) -> None:
    async with running_manager() as (blobs, manager):
        blobs.contents |= EMBEDDER.contents
        async with running_tokenizer(manager, tmp_path / "t") as tokenizer:
            pass  # gone, but its address is known
        port = int(tokenizer.rpartition(":")[2])
        async with running_worker(tmp_path, tokenizer=tokenizer) as worker:
            await worker.serve(MODELS)

            call = worker.inference.Embed(EMBED, timeout=DEADLINE_S)
            error = await within_deadline(
                refused(worker, call, StatusCode.UNAVAILABLE, r"tokenizer service cannot be reached .*Retry\.")
            )
            assert isinstance(error, TokenizerUnreachableError)
            ids = pb.TokenIds(ids=np.array([2, 5, 3], "<i4").tobytes(), lengths=np.array([3], "<i4").tobytes())
            await worker.inference.Embed(pb.EmbedRequest(model="embedder", token_ids=ids), timeout=DEADLINE_S)

            async with running_tokenizer(manager, tmp_path / "t", port=port), asyncio.timeout(DEADLINE_S):
                while not await embeds(worker):  # noqa: ASYNC110  the worker tells of it only when asked
                    await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_a_tokenizer_that_only_the_manager_has_is_unavailable_while_the_manager_is_away(tmp_path: Path) -> None:
    async with running_manager() as (_, manager):
        pass  # gone
    async with (
        running_tokenizer(manager, tmp_path / "t") as tokenizer,
        running_worker(tmp_path, tokenizer=tokenizer) as worker,
    ):
        await worker.serve(MODELS)

        call = worker.inference.Embed(EMBED, timeout=DEADLINE_S)
        message = r"is not here yet, and the manager cannot be reached .*Retry\."
        error = await within_deadline(refused(worker, call, StatusCode.UNAVAILABLE, message))

    assert isinstance(error, ManagerUnreachableError)


async def embeds(worker: Worker) -> bool:
    """Whether texts are answered; they may be unavailable until the worker is connected again."""
    try:
        await still_embeds(worker)
    except grpc.aio.AioRpcError as error:
        if error.code() is not StatusCode.UNAVAILABLE:
            raise
        return False
    return True


class SilentTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Takes requests and never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def Tokenize(self, _request: object, _context: object) -> None:  # noqa: N802  as in the contract
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


async def test_a_tokenizer_that_does_not_answer_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    silent = SilentTokenizer()

    def register(server: grpc.aio.Server) -> None:
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(silent, server)

    async with serving(register) as tokenizer, running_worker(tmp_path, tokenizer=tokenizer) as worker:
        await worker.serve(MODELS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.inference.Embed(EMBED, timeout=0.3)
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(silent.left.wait(), 5)  # the hop ends with the request
        await worker.open_inference.ModelInfer(affine())


async def test_a_model_that_loads_is_unavailable_until_it_is_ready(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        await worker.serve({"affine@1": MODELS["affine@1"]})
        worker.manager.may_send.clear()
        await worker.manager.assign(MODELS, {"affine": 1, "embedder": 1})
        await worker.manager.reported("embedder@1", "DOWNLOADING")
        error = await refused(
            worker, worker.inference.Embed(EMBED), StatusCode.UNAVAILABLE, r"embedder@1 is still loading .*Retry\."
        )
        assert isinstance(error, ModelLoadingError)
        worker.manager.may_send.set()
        await worker.manager.reported("embedder@1", "READY")
        await still_embeds(worker)


async def test_health_says_not_serving_until_what_was_assigned_first_is_loaded(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        worker.manager.may_send.clear()
        await worker.manager.assign(MODELS, {"affine": 1})
        await worker.manager.reported("affine@1", "DOWNLOADING")
        assert not (await worker.open_inference.ServerReady(oip.ServerReadyRequest())).ready
        worker.manager.may_send.set()
        await worker.is_serving()
        assert (await worker.open_inference.ServerReady(oip.ServerReadyRequest())).ready


async def statistics(worker: Worker, model: str) -> oip.ModelStatistics:
    answer = await worker.open_inference.ModelStatistics(oip.ModelStatisticsRequest(name=model))
    return answer.model_stats[0]


async def test_a_request_whose_deadline_passes_in_the_queue_never_runs(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        await worker.serve(MODELS)
        blocker = await running(worker, FOR_EVER)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.open_inference.ModelInfer(slow(1), timeout=0.2)
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        blocker.cancel()
        assert await infer(worker, 3) == [3]
        assert (await statistics(worker, "slow")).inference_count == 1  # the last one alone


async def test_a_caller_that_leaves_frees_the_engine(tmp_path: Path) -> None:
    async with running_worker(tmp_path) as worker:
        await worker.serve(MODELS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.open_inference.ModelInfer(slow(FOR_EVER), timeout=0.2)
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        assert await asyncio.wait_for(infer(worker, 1, 2), 5) == [1, 2]
        assert (await worker.open_inference.ModelInfer(affine())).outputs


async def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    async with running_worker(tmp_path, max_queue_tokens=2) as worker:
        await worker.serve(MODELS)
        # One waits or runs; at least one of the others finds the queue full, both if they come before a lane is free.
        calls = [asyncio.ensure_future(worker.open_inference.ModelInfer(slow(FOR_EVER, FOR_EVER))) for _ in range(3)]
        full, others = await asyncio.wait(calls, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        assert others
        for call in others:
            call.cancel()
        message = r"slow@1 holds 2 tokens and takes at most 2; this request has 2"
        for call in full:
            error = await refused(worker, call, StatusCode.RESOURCE_EXHAUSTED, message)
            assert isinstance(error, OverloadedError)
        assert await infer(worker, 1, 2) == [1, 2]


async def alive_and_ready(worker: Worker) -> tuple[bool, bool]:
    live = await worker.open_inference.ServerLive(oip.ServerLiveRequest())
    ready = await worker.open_inference.ServerReady(oip.ServerReadyRequest())
    return live.live, ready.ready


async def test_a_worker_with_as_many_calls_as_it_takes_says_that_it_lives_and_is_ready(tmp_path: Path) -> None:
    async with running_worker(tmp_path, max_concurrent_calls=1) as worker:
        await worker.serve(MODELS)
        await worker.is_serving()
        blocker = await running(worker, FOR_EVER)
        assert await alive_and_ready(worker) == (True, True)
        blocker.cancel()


async def test_a_worker_that_drains_says_that_it_lives_and_is_not_ready(tmp_path: Path) -> None:
    async def call_until_refused(worker: Worker) -> None:
        while True:
            await worker.open_inference.ServerMetadata(oip.ServerMetadataRequest())

    async def observe(worker: Worker, blocker: "asyncio.Task[list[float]]") -> tuple[bool, bool]:
        try:
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await asyncio.wait_for(call_until_refused(worker), DEADLINE_S)
            return await alive_and_ready(worker)
        finally:
            blocker.cancel()

    async with AsyncExitStack() as stack:
        async with running_worker(tmp_path, drain_timeout_s=30) as worker:
            await worker.serve(MODELS)
            await worker.is_serving()
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(worker.address))
            ours = replace(worker, open_inference=GRPCInferenceServiceStub(channel))
            said = asyncio.create_task(observe(ours, await running(ours, FOR_EVER)))
        assert await said == (True, False)


async def test_work_under_way_is_finished_before_the_worker_stops(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        async with running_worker(tmp_path, drain_timeout_s=10) as worker:
            await worker.serve(MODELS)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(worker.address))
            ours = replace(worker, open_inference=GRPCInferenceServiceStub(channel))
            call = await running(ours, 30_000)  # about 0.3 s
        assert await call == [30_000]
    assert engine_threads() == []


async def test_a_worker_that_cannot_listen_ends_with_the_reason(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"Cannot listen on 127.0.0.1:{port}"):
            async with working(Settings(host="127.0.0.1", port=port, cache_dir=tmp_path)):
                pass
    assert engine_threads() == []


async def test_a_worker_whose_agent_fails_stops_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_agent: Agent) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Agent, "run", fail)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    with pytest.raises(RuntimeError, match="unforeseen"):
        async with working(Settings(host="127.0.0.1", port=0, cache_dir=tmp_path, drain_delay_s=0)):
            await asyncio.wait_for(stopping.wait(), 5)
    assert engine_threads() == []


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")]
