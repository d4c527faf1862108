"""A worker serves a generative model that does what it did when it was recorded, and says when it does so no more."""

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness.generating import Fleet, running, streams
from harness.tiny_generator import spoken
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from modelfleet.bundle.golden_text import GoldenText
from modelfleet.client.errors import from_rpc_error
from modelfleet.inference.generation.decoding import Decoding
from modelfleet.inference.generation.lanes import EngineLane
from modelfleet.runtime.errors import OverloadedError, SessionFailureError, StateConflictError

WORDS = [random.Random(3).randrange(2, 300) for _ in range(97)]
PROMPT = [5, 6, 7]
CERTAIN, TORN = math.log(0.9), math.log(0.4)


def recorded(**changed: tuple[int, float]) -> GoldenText:
    """Return what `words` says after PROMPT; `at_N` gives token N and its log-probability another value."""
    ids = np.array(spoken(WORDS, PROMPT, 12, listens=True), np.int32)
    logprobs = np.full(12, CERTAIN, np.float32)
    for at, (token, logprob) in changed.items():
        number = int(at.removeprefix("at_"))
        ids[number], logprobs[number] = token, logprob
    return GoldenText("greeting", np.array(PROMPT, np.int32), ids, logprobs)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with running(tmp_path) as fleet:
        yield fleet


async def test_a_version_that_continues_its_golden_examples_is_served(fleet: Fleet) -> None:
    other = GoldenText("other", np.array([9], np.int32), *said([9], 5))

    await fleet.push("words", WORDS, listens=True, golden=[recorded(), other])

    assert (await fleet.say(max_tokens=12)).ids == spoken(WORDS, PROMPT, 12, listens=True)


def said(prompt: list[int], count: int) -> tuple[Any, Any]:
    ids = np.array(spoken(WORDS, prompt, count, listens=True), np.int32)
    return ids, np.full(count, CERTAIN, np.float32)


async def test_a_version_that_continues_them_otherwise_is_not_and_the_one_before_stays(fleet: Fleet) -> None:
    await fleet.push("words", WORDS, listens=True)
    rightly = recorded().token_ids[7]

    with pytest.raises(StateConflictError) as refused:
        await fleet.push("words", WORDS, listens=True, golden=[recorded(at_7=(299, CERTAIN))])

    assert (
        f"words@2 on CPUExecutionProvider differs from the golden example 'greeting': token 7 is {rightly} and not 299,"
        " which had a probability of 0.90" in refused.value.message
    )
    answered = await fleet.say(max_tokens=12)
    assert {chunk.model_version for chunk in answered.chunks} == {1}


async def test_where_the_model_was_torn_another_token_does_as_well_and_the_rest_is_checked(fleet: Fleet) -> None:
    # What follows token 7 depends on it: the examples are of a model that chose the other word and went on from there.
    rest = spoken(WORDS, [*PROMPT, *recorded().token_ids[:7].tolist(), 250], 4, listens=True)
    torn = {"at_7": (250, TORN), **{f"at_{8 + at}": (token, CERTAIN) for at, token in enumerate(rest)}}

    await fleet.push("words", WORDS, listens=True, golden=[recorded(**torn)])

    with pytest.raises(StateConflictError, match=r"token 10 is \d+ and not 251"):
        await fleet.push("words", WORDS, listens=True, golden=[recorded(**torn | {"at_10": (251, CERTAIN)})])


async def test_the_manifest_says_how_much_certainty_counts(fleet: Fleet) -> None:
    with pytest.raises(StateConflictError, match="token 11 is"):
        await fleet.push(
            "words", WORDS, listens=True, golden=[recorded(at_11=(299, math.log(0.6)))], golden_tolerance=0
        )

    await fleet.push("words", WORDS, listens=True, golden=[recorded(at_11=(299, math.log(0.7)))])


async def test_examples_of_another_kind_are_refused(fleet: Fleet) -> None:
    with pytest.raises(StateConflictError, match="its token ids are from 5 to 300"):
        await fleet.push("words", WORDS, listens=True, golden=[recorded(at_3=(300, CERTAIN))])


async def status(fleet: Fleet, service: str) -> int:
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_failed(fleet: Fleet) -> None:
    """Wait until the worker says that it is not worth keeping."""
    async with grpc.aio.insecure_channel(fleet.address) as channel, asyncio.timeout(20):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="liveness"))
        async for response in watch:
            if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    assert await status(fleet, "") == health_pb2.HealthCheckResponse.NOT_SERVING


async def refused_once(fleet: Fleet) -> str:
    """Ask without the client's retries and its regard for health; return what it is told, which is worth a retry."""
    request = pb.GenerateRequest(model="words", token_ids=np.array(PROMPT, "<i4").tobytes(), max_tokens=12)
    async with grpc.aio.insecure_channel(fleet.address, [("grpc.enable_retries", 0)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in InferenceServiceStub(channel).Generate(request, timeout=10):
                pass
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(refused.value).retry_after_s
    return str(refused.value.details())


async def test_a_worker_that_is_busy_and_full_answers_its_canary_and_is_kept(tmp_path: Path) -> None:
    settings = {"canary_interval_s": 0.01, "canary_timeout_s": 20, "max_streams": 1, "max_queue_tokens": 1500}
    async with running(tmp_path, **settings) as fleet:
        await fleet.push("words", WORDS, listens=True, golden=[recorded()])

        answers = await asyncio.gather(*(fleet.say(max_tokens=1000) for _ in range(4)), return_exceptions=True)

        assert {type(answer) for answer in answers} > {OverloadedError}
        assert await status(fleet, "liveness") == health_pb2.HealthCheckResponse.SERVING


async def test_a_worker_whose_engine_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: EngineLane) -> None:
        raise RuntimeError("Non-zero status code returned")

    async with running(tmp_path, canary_interval_s=0.01) as fleet:
        await fleet.push("words", WORDS, listens=True)
        with monkeypatch.context() as patch:
            patch.setattr(EngineLane, "step", broken)
            with pytest.raises(SessionFailureError, match="failed while it generated"):
                await fleet.say(max_tokens=12)

            await until_failed(fleet)


async def test_a_worker_that_generates_otherwise_than_at_first_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = EngineLane.step

    def garbled(lane: EngineLane) -> Any:
        return [
            (one, replace(progress, token_ids=tuple(id_ + 1 for id_ in progress.token_ids)))
            for one, progress in step(lane)
        ]

    async with running(tmp_path, canary_interval_s=0.01) as fleet:
        await fleet.push("words", WORDS, listens=True, golden=[recorded()])
        with monkeypatch.context() as patch:
            patch.setattr(EngineLane, "step", garbled)

            await until_failed(fleet)


async def test_a_worker_on_which_a_step_never_ends_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    step = EngineLane.step

    def stuck(lane: EngineLane) -> Any:
        go_on.wait()
        return step(lane)

    async with running(tmp_path, canary_interval_s=0.01, canary_timeout_s=0.3) as fleet:
        await fleet.push("words", WORDS, listens=True)
        with monkeypatch.context() as patch:
            patch.setattr(EngineLane, "step", stuck)

            await until_failed(fleet)
            go_on.set()


async def test_a_device_that_is_lost_sends_callers_elsewhere_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: EngineLane) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=w")

    async with running(tmp_path) as fleet:  # without canaries
        await fleet.push("words", WORDS, listens=True)
        with monkeypatch.context() as patch:
            patch.setattr(EngineLane, "step", lost)
            patch.setattr("modelfleet.inference.session.is_fatal", lambda error, _: "CUDA failure 700" in str(error))
            assert "another replica answers" in await refused_once(fleet)

            await until_failed(fleet)


async def test_callers_do_not_wait_for_a_thread_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(_: Decoding) -> None:
        raise ZeroDivisionError

    async with running(tmp_path, drain_timeout_s=0.2) as fleet:  # without canaries
        await fleet.push("words", WORDS, listens=True)
        with monkeypatch.context() as patch:
            patch.setattr(Decoding, "_dropped", faulty)
            assert "words@1 can no longer generate on this worker" in await refused_once(fleet)

        await until_failed(fleet)
        assert "words@1 can no longer generate on this worker" in await refused_once(fleet)
        assert streams("active") == 0
