"""A worker says what is true: what it serves, what that takes, and whether it is worth keeping."""

import asyncio
import errno
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import graphs
from harness.assigning_manager import AssigningManager
from harness.golden import affine_example, with_golden
from harness.serving import serving
from harness.worker import running_worker, still_embeds
from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.api.manager.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from modelfleet.api.oip.v2 import open_inference_pb2
from modelfleet.api.oip.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.client import AsyncClient
from modelfleet.inference import memory_budget, session
from modelfleet.inference.__main__ import Settings, working
from modelfleet.inference.cache import Cache
from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.session import Device, is_fatal
from modelfleet.inference.tokenization import Tokenization
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    InsufficientMemoryError,
    InternalError,
    InvalidInputError,
    ModelfleetError,
    ModelLoadingError,
    OverloadedError,
    TokenizerNotFoundError,
)
from modelfleet.runtime.memory import resident_memory, return_free_memory

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Running:
    """A worker, its manager and a client of it."""

    address: str
    manager: AssigningManager
    client: AsyncClient
    health: health_pb2_grpc.HealthStub
    open_inference: GRPCInferenceServiceStub

    async def status(self, service: str) -> int:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def answers(self, model: str = "m") -> bool:
        outputs = await self.client.infer(model, {"x": np.ones((1, 3), np.float32)})
        return np.array_equal(outputs["y"], np.full((1, 3), 3))


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[Running]:
    manager = AssigningManager()

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(manager, server)
        add_ModelServiceServicer_to_server(manager, server)

    async with serving(register) as address:
        own = Settings(
            **{
                "host": "127.0.0.1",
                "port": 0,
                "drain_delay_s": 0,
                "drain_timeout_s": 2,
                "threads": 1,
                "manager": address,
                "cache_dir": directory / "cache",
                "canary_interval_s": 0,
                **settings,
            }
        )
        async with (
            working(own) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
            AsyncClient(inference=f"127.0.0.1:{server.port}", manager=address, timeout_s=10) as client,
        ):
            health, open_inference = health_pb2_grpc.HealthStub(channel), GRPCInferenceServiceStub(channel)
            yield Running(f"127.0.0.1:{server.port}", manager, client, health, open_inference)


async def test_a_version_whose_golden_examples_fail_is_not_served_and_the_one_before_stays(tmp_path: Path) -> None:
    good = with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, affine_example())
    bad = with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, affine_example(off_by=0.5))
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": good}, {"m": 1})
        await worker.manager.reported("m@1", "READY")

        await worker.manager.assign({"m@1": good, "m@2": bad}, {"m": 2})

        reason = (await worker.manager.reported("m@2", "FAILED")).reason
        assert "m@2 on CPUExecutionProvider differs from the golden example 'first': output 'y' by 0.333" in reason
        assert await worker.answers()
        with pytest.raises(ModelLoadingError, match="could not be loaded on this worker: m@2 on CPUExecutionProvider"):
            await worker.answers("m@2")


async def test_callers_of_a_replica_that_could_not_load_a_version_are_answered_by_another(
    tmp_path: Path,
) -> None:
    sample = graphs.tensor_bundle(graphs.affine())
    rotten = graphs.SampleBundle(sample.bundle, {digest: bytes(len(data)) for digest, data in sample.contents.items()})
    async with running(tmp_path / "good") as good, running(tmp_path / "bad") as bad:
        await good.manager.assign({"m@1": sample}, {"m": 1})
        await good.manager.reported("m@1", "READY")
        await bad.manager.assign({"m@1": rotten}, {"m": 1})
        await bad.manager.reported("m@1", "FAILED")

        async with AsyncClient(inference=f"ipv4:{good.address},{bad.address}", timeout_s=10) as client:
            for _ in range(8):
                outputs = await client.infer("m", {"x": np.ones((1, 3), np.float32)})
                assert outputs["y"].tolist() == [[3, 3, 3]]


async def test_what_a_version_runs_on_takes_and_has_answered_is_reported(tmp_path: Path) -> None:
    sample = with_golden(graphs.tensor_bundle(graphs.affine()), tmp_path, affine_example())
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": sample}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        for _ in range(3):
            assert await worker.answers()
        with pytest.raises(InvalidInputError, match="float32"):
            await worker.client.infer("m", {"x": np.ones((1, 3), np.float64)})

        await worker.manager.assign({"m@1": sample, "m@2": sample}, {"m": 1})  # makes it report
        await worker.manager.reported("m@2", "READY")

        report = worker.manager.reports["m@1"]
        assert list(report.providers) == ["CPUExecutionProvider"]
        assert report.memory.host_bytes >= 0
        assert report.memory.host_peak_bytes > 0
        assert (report.traffic.request_count, report.traffic.failure_count) == (3, 0)
        assert len(report.traffic.latency_counts) == 18
        assert sum(report.traffic.latency_counts) == 3


async def test_failures_of_the_version_are_counted_wherever_they_happen_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = graphs.text_bundle(graphs.embedder(), Task.EMBED)
    errors: list[ModelfleetError] = []

    async def fail(*_: object, **__: object) -> None:
        raise errors[-1]

    monkeypatch.setattr(Tokenization, "tokenize", fail)
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": sample}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        for error in (
            InternalError("The tokenizer's log has the cause."),
            TokenizerNotFoundError("It has been deleted."),
            InvalidInputError("texts[0] has no tokens."),
            DeadlineExpiredError("The deadline passed."),
            OverloadedError("The tokenizer is busy."),
        ):
            errors.append(error)
            with pytest.raises(type(error)):
                await worker.client.embed("m", ["the cat"])

        await worker.manager.assign({"m@1": sample, "m@2": sample}, {"m": 1})  # makes it report
        await worker.manager.reported("m@2", "READY")

        traffic = worker.manager.reports["m@1"].traffic
        assert (traffic.request_count, traffic.failure_count) == (2, 2)


async def test_a_version_that_no_canary_watches_says_so_wherever_it_is_listed(tmp_path: Path) -> None:
    graph = graphs.affine()
    graph.graph.node[-1].output[0] = "exact"
    for operator, inputs, output, more in (
        ("Equal", ["x", "one"], "is_one", {}),
        ("Cast", ["is_one"], "ones", {"to": onnx.TensorProto.FLOAT}),
        ("Sub", ["one", "ones"], "others", {}),
        ("RandomNormalLike", ["exact"], "noise", {}),
        ("Mul", ["noise", "others"], "noise_of_others", {}),
        ("Add", ["exact", "noise_of_others"], "y", {}),
    ):
        graph.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **more))
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": graphs.tensor_bundle(graph)}, {"m": 1})

        reason = (await worker.manager.reported("m@1", "READY")).reason

        assert "neither warmed up nor watched: it has no golden examples, and made-up inputs do not show" in reason
        (listed,) = await worker.client.served_models()
        assert listed.state_reason == reason
        assert await worker.answers()


async def test_a_version_that_does_not_fit_is_refused_with_the_figures_and_others_are_served(tmp_path: Path) -> None:
    small = graphs.tensor_bundle(graphs.affine())
    large = graphs.tensor_bundle(graphs.large(30_000_000))
    return_free_memory()  # what earlier tests have left behind is no part of it
    async with running(tmp_path, memory_bytes=resident_memory() + 35_000_000) as worker:
        await worker.manager.assign({"m@1": small}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        await worker.manager.assign({"m@1": small, "m@2": large}, {"m": 1})

        reason = (await worker.manager.reported("m@2", "FAILED")).reason

        assert "m@2 needs about 45 MB of host memory to be loaded" in reason
        assert await worker.answers()


async def test_versions_beyond_the_limit_take_turns_and_requests_wait_for_theirs(tmp_path: Path) -> None:
    samples = {f"{name}@1": graphs.tensor_bundle(graphs.affine()) for name in "abc"}
    async with running(tmp_path, max_loaded_versions=2) as worker:
        await worker.manager.assign(samples, dict.fromkeys("abc", 1))
        for key in samples:
            await worker.manager.reported(key, "READY")
        assert await loaded(worker) < set(samples)

        assert await worker.answers("a")
        assert await worker.answers("c")
        assert await loaded(worker) == {"a@1", "c@1"}
        assert await worker.answers("b")  # in place of a, which was not used for longest
        assert await loaded(worker) == {"b@1", "c@1"}

        answers = await asyncio.gather(*(worker.answers(name) for name in "abccbaacb" * 4))
        assert all(answers)
        assert len(await loaded(worker)) == 2


async def test_what_a_version_has_answered_outlives_its_eviction(tmp_path: Path) -> None:
    samples = {f"{name}@1": graphs.tensor_bundle(graphs.affine()) for name in "ab"}
    async with running(tmp_path, max_loaded_versions=1) as worker:
        await worker.manager.assign(samples, {"a": 1, "b": 1})
        for key in samples:
            await worker.manager.reported(key, "READY")

        for name in "aab":  # the last is loaded in place of the other
            assert await worker.answers(name)
        await worker.manager.assign({**samples, "c@1": samples["a@1"]}, {"a": 1, "b": 1})  # makes it report
        await worker.manager.reported("c@1", "READY")
        assert [worker.manager.reports[f"{name}@1"].traffic.request_count for name in "ab"] == [2, 1]

        assert await worker.answers("a")
        await worker.manager.assign({**samples, "d@1": samples["a@1"]}, {"a": 1, "b": 1})
        await worker.manager.reported("d@1", "READY")
        assert worker.manager.reports["a@1"].traffic.request_count == 3


async def test_a_version_that_this_release_does_not_understand_fails_alone(tmp_path: Path) -> None:
    class Tomorrow(Manifest):
        def to_json(self) -> str:
            return super().to_json().replace('"task":"tensor"', '"task":"sing"')

    today = graphs.tensor_bundle(graphs.affine())
    manifest = Tomorrow.model_validate(today.bundle.manifest.model_dump())
    tomorrow = replace(today, bundle=replace(today.bundle, manifest=manifest))
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": today}, {"m": 1})
        await worker.manager.reported("m@1", "READY")

        await worker.manager.assign({"m@1": today, "m@2": tomorrow, "n@1": today}, {"m": 2, "n": 1})

        reason = (await worker.manager.reported("m@2", "FAILED")).reason
        assert reason.startswith(
            "This worker's release does not know the version: manifest_json: task: Input should be"
        )
        await worker.manager.reported("n@1", "READY")
        assert await worker.answers("m")
        assert await worker.answers("n")
        await worker.manager.assign({"m@1": today, "o@1": today}, {"m": 1})
        await worker.manager.reported("o@1", "READY")
        assert "m@2" not in worker.manager.reports


async def test_questions_about_a_model_take_no_turns_of_its_canary(tmp_path: Path) -> None:
    sample = graphs.tensor_bundle(graphs.affine())
    request = open_inference_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 1, 1])
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": sample, "m@2": sample}, {"m": {1: 1, 2: 1}})
        for key in ("m@1", "m@2"):
            await worker.manager.reported(key, "READY")
        answered = []
        for question in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
            message = getattr(open_inference_pb2, f"{question}Request")(name="m")
            await getattr(worker.open_inference, question)(message)
            answered.append((await worker.open_inference.ModelInfer(request)).model_version)

    assert sorted(answered) == ["1", "1", "2", "2"]


async def test_an_evicted_version_is_ready_without_being_loaded(tmp_path: Path) -> None:
    samples = {f"{name}@1": graphs.tensor_bundle(graphs.affine()) for name in "ab"}
    async with running(tmp_path, max_loaded_versions=1) as worker:
        await worker.manager.assign(samples, {"a": 1, "b": 1})
        for key in samples:
            await worker.manager.reported(key, "READY")
        assert await worker.answers("a")
        ask = worker.open_inference

        assert (await ask.ModelReady(open_inference_pb2.ModelReadyRequest(name="b"))).ready
        await ask.ModelStatistics(open_inference_pb2.ModelStatisticsRequest(name="b"))

        assert await loaded(worker) == {"a@1"}
        described = await ask.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="b"))
        assert [spec.name for spec in described.inputs] == ["x"]


@pytest.fixture
def memory_of_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as if sessions alone took memory, 50 MB each, whatever else this process does meanwhile."""
    sessions: weakref.WeakSet[session.Session] = weakref.WeakSet()
    make = session.Session.__init__

    def made(self: session.Session, *arguments: Any) -> None:
        make(self, *arguments)
        sessions.add(self)

    monkeypatch.setattr(session.Session, "__init__", made)
    monkeypatch.setattr(memory_budget, "resident_memory", lambda: 50_000_000 * len(sessions))


@pytest.mark.usefixtures("memory_of_sessions")
async def test_versions_that_were_idle_longest_make_way_for_one_that_does_not_fit(tmp_path: Path) -> None:
    large = graphs.tensor_bundle(graphs.large(50_000_000))
    samples = {f"{name}@1": large for name in "ab"}
    # Each needs 75 MB while it loads and 50 afterwards: two fit, a third does not.
    async with running(tmp_path, evict_idle=True, memory_bytes=150_000_000) as worker:
        await worker.manager.assign(samples, {"a": 1, "b": 1})
        for key in samples:
            await worker.manager.reported(key, "READY")
        assert await worker.answers("b")
        assert await worker.answers("a")
        assert await loaded(worker) == {"a@1", "b@1"}

        await worker.manager.assign({**samples, "c@1": large}, {"a": 1, "b": 1, "c": 1})
        await worker.manager.reported("c@1", "READY")

        assert await loaded(worker) == {"a@1", "c@1"}
        assert await worker.answers("b")
        assert await loaded(worker) == {"b@1", "c@1"}  # c was never asked, but became ready later


@pytest.mark.usefixtures("memory_of_sessions")
async def test_for_a_version_that_would_not_fit_on_an_empty_worker_none_makes_way(tmp_path: Path) -> None:
    small, large = graphs.tensor_bundle(graphs.affine()), graphs.tensor_bundle(graphs.large(60_000_000))
    async with running(tmp_path, evict_idle=True, memory_bytes=80_000_000) as worker:
        await worker.manager.assign({"m@1": small}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        await worker.manager.assign({"m@1": small, "n@1": large}, {"m": 1, "n": 1})

        reason = (await worker.manager.reported("n@1", "FAILED")).reason

        assert "n@1 needs about 90 MB of host memory to be loaded" in reason
        assert worker.manager.reports["m@1"].providers


async def test_an_evicted_version_does_not_wait_for_the_download_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {f"{name}@1": graphs.tensor_bundle(graphs.affine()) for name in "ab"}
    other = graphs.tensor_bundle(graphs.image())
    downloading = asyncio.Event()
    fetch = Cache.fetch

    async def never_ends(cache: Cache, file: Any, download: Any) -> None:
        if file in other.bundle.files:
            downloading.set()
            await asyncio.Event().wait()
        await fetch(cache, file, download)

    monkeypatch.setattr(Cache, "fetch", never_ends)
    async with running(tmp_path, max_loaded_versions=1) as worker:
        await worker.manager.assign(samples, {"a": 1, "b": 1})
        for key in samples:
            await worker.manager.reported(key, "READY")
        await worker.manager.assign({**samples, "n@1": other}, {"a": 1, "b": 1})
        await downloading.wait()

        assert await worker.answers("a")
        assert await worker.answers("b")


async def test_an_evicted_version_that_cannot_be_loaded_again_fails_with_the_reason_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {f"{name}@1": graphs.tensor_bundle(graphs.affine()) for name in "ab"}
    async with running(tmp_path, max_loaded_versions=1) as worker:
        await worker.manager.assign(samples, dict.fromkeys("ab", 1))
        for key in samples:
            await worker.manager.reported(key, "READY")
        assert await worker.answers("b")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryBudget, "require", no_memory)
            with pytest.raises(ModelLoadingError, match="a@1 could not be loaded on this worker: no memory is left"):
                await worker.answers("a")
            await worker.manager.reported("a@1", "FAILED")
        await worker.manager.reported("a@1", "READY")
        assert await worker.answers("a")
        assert await worker.answers("b")


def no_memory(*_: object) -> None:
    raise InsufficientMemoryError("no memory is left")


async def loaded(worker: Running) -> set[str]:
    served = await worker.client.served_models()
    assert {one.state for one in served} == {"READY"}
    return {f"{one.model}@{one.model_version}" for one in served if one.providers}


async def test_a_corrupt_download_fails_the_version_by_its_hashes_and_heals(tmp_path: Path) -> None:
    sample = graphs.tensor_bundle(graphs.affine())
    (digest,) = sample.contents
    async with running(tmp_path) as worker:
        rotten = graphs.SampleBundle(sample.bundle, {digest: bytes(len(sample.contents[digest]))})
        await worker.manager.assign({"m@1": rotten}, {"m": 1})

        reason = (await worker.manager.reported("m@1", "FAILED")).reason

        assert f"should have {digest}" in reason
        worker.manager.contents |= sample.contents
        await worker.manager.reported("m@1", "READY")
        assert await worker.answers()


async def test_a_full_disk_fails_the_version_alone_and_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Cache.fetch

    async def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": graphs.tensor_bundle(graphs.affine())}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        monkeypatch.setattr(Cache, "fetch", no_space)
        other = graphs.tensor_bundle(graphs.image())
        await worker.manager.assign({"m@1": graphs.tensor_bundle(graphs.affine()), "n@1": other}, {"m": 1, "n": 1})

        assert "No space left on device" in (await worker.manager.reported("n@1", "FAILED")).reason
        assert await worker.answers()
        monkeypatch.setattr(Cache, "fetch", fetch)
        await worker.manager.reported("n@1", "READY")


async def test_a_fatal_device_error_sends_callers_elsewhere_and_fails_readiness_and_liveness_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=w")

    monkeypatch.setattr(session, "is_fatal", lambda error, _: is_fatal(error, Device.CUDA))
    async with running(tmp_path) as worker:
        await worker.manager.assign({"m@1": graphs.tensor_bundle(graphs.affine())}, {"m": 1})
        await worker.manager.reported("m@1", "READY")
        watch = worker.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
        assert (await watch.read()).status == SERVING
        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.InferenceSession, "run", lost)
            request = open_inference_pb2.ModelInferRequest(model_name="m")
            request.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 1, 1])
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await worker.open_inference.ModelInfer(request)

        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "another replica answers" in refused.value.details()
        assert "700" not in refused.value.details()
        assert (await watch.read()).status == NOT_SERVING
        assert await worker.status("") == NOT_SERVING
        assert not (await worker.open_inference.ServerLive(open_inference_pb2.ServerLiveRequest())).live
        assert not (await worker.open_inference.ServerReady(open_inference_pb2.ServerReadyRequest())).ready


async def test_a_version_whose_tokenizer_the_tokenizer_service_cannot_use_is_never_ready(tmp_path: Path) -> None:
    good = graphs.text_bundle(graphs.embedder(), Task.EMBED)
    bad = graphs.text_bundle(graphs.embedder(), Task.EMBED, tokenizer=b'{"model": "none"}')
    async with running_worker(tmp_path) as worker:
        await worker.manager.assign({"embedder@1": good, "embedder@2": bad}, {"embedder": 1})

        report = await worker.manager.reported("embedder@2", "FAILED")

        assert "is no tokenizer.json that can be used" in report.reason
        await worker.manager.reported("embedder@1", "READY")
        await still_embeds(worker)
