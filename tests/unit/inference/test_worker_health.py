"""When a worker is worth keeping, and when it is to be started again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import graphs
from modelfleet.inference.assignment import AssignedVersion, VersionKey
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.canary import Canary, Trial
from modelfleet.inference.engine import Engine
from modelfleet.inference.health import Health
from modelfleet.inference.jobs import RowsFailedError
from modelfleet.inference.models import TensorModel
from modelfleet.inference.served_models import ServedModels
from modelfleet.inference.session import Device
from modelfleet.inference.states import VersionState
from modelfleet.runtime.errors import FatalDeviceError, OverloadedError

FOR_EVER = 1e12


@dataclass
class Worker:
    """An engine with one READY version, the health that watches it, and whether that has said that it failed."""

    engine: Engine
    model: TensorModel
    failed: asyncio.Event

    async def ask(self, x: float) -> Any:
        return await self.engine.submit(self.model, {"x": np.array([[x]], np.float32)}, [1], deadline=float("inf"))


@asynccontextmanager
async def watched(
    directory: Path,
    *,
    timeout_s: float = 30.0,
    expected: float = 0.0,
    lanes: int = 1,
    has_canary: bool = True,
    tamper: Callable[[Any], None] = lambda _: None,
) -> AsyncIterator[Worker]:
    """Watch the slow identity; its canary is 0, and should answer `expected`. `tamper` gets its session."""
    sample = graphs.tensor_bundle(graphs.slow())
    model = graphs.load(sample, directory, limits=BatchLimits(max_tokens=1))
    assert isinstance(model, TensorModel)
    model.canary = Canary(
        Trial({"x": np.zeros((1, 1), np.float32)}, [1]), [np.full((1, 1), expected, np.float32)], tolerance=0.01
    )
    if not has_canary:
        model.canary = None
    tamper(model.session)
    engine, failed = Engine(lanes, max_queue_tokens=20), asyncio.Event()
    engine.attach(model)
    served = ServedModels()
    version = served.add(AssignedVersion(VersionKey("m", 1), sample.bundle))
    for state in (VersionState.VERIFYING, VersionState.WARMING, VersionState.READY):
        served.move(version, state)
    version.model = model

    async def fail() -> None:
        failed.set()

    health = Health(served, engine, fail, interval_s=0.01, timeout_s=timeout_s)
    watching = asyncio.create_task(health.run())
    try:
        yield Worker(engine, model, failed)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await asyncio.to_thread(engine.close)


def raising(session: Any, error: Exception, *, device: Device = Device.CUDA) -> None:
    """Let ONNX Runtime's own session raise: what no CPU does."""

    class Broken:
        def run(self, *_: object) -> object:
            raise error

    session._session = Broken()  # noqa: SLF001  the seam to ONNX Runtime
    session.device = device


async def until_canaries(worker: Worker, count: int) -> None:
    started = worker.engine.batches_ended
    while worker.engine.batches_ended < started + count:  # noqa: ASYNC110  a count of the engine's threads
        await asyncio.sleep(0.01)


async def test_a_worker_that_answers_its_canary_is_kept(tmp_path: Path) -> None:
    async with watched(tmp_path) as worker:
        await until_canaries(worker, 3)

        assert not worker.failed.is_set()
        assert worker.model.record.success.count == 0


async def test_a_worker_whose_canary_answers_otherwise_than_at_first_has_failed(tmp_path: Path) -> None:
    async with watched(tmp_path, expected=1.0) as worker, asyncio.timeout(10):
        await worker.failed.wait()


async def test_a_worker_whose_canary_fails_has_failed(tmp_path: Path) -> None:
    def broken(session: Any) -> None:
        raising(session, RuntimeError("Non-zero status code returned"), device=Device.CPU)

    async with watched(tmp_path, tamper=broken) as worker, asyncio.timeout(10):
        with pytest.raises(RowsFailedError, match="m@1 failed on this input"):
            await worker.ask(1)
        await worker.failed.wait()


async def test_an_error_that_no_device_recovers_from_fails_the_worker_at_once_and_sends_callers_elsewhere(
    tmp_path: Path,
) -> None:
    async with watched(tmp_path) as worker:
        raising(
            worker.model.session, RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")
        )

        with pytest.raises(FatalDeviceError, match="no longer works") as caught:
            await worker.ask(1)

        assert caught.value.retry_after_s == 0.1
        async with asyncio.timeout(10):
            await worker.failed.wait()


async def test_a_lack_of_memory_on_the_device_is_no_failure_of_it(tmp_path: Path) -> None:
    async with watched(tmp_path) as worker:
        session = worker.model.session._session  # noqa: SLF001
        raising(worker.model.session, RuntimeError("Failed to allocate memory for requested buffer of size 99999"))
        with pytest.raises(OverloadedError, match="memory is full"):
            await worker.ask(1)
        assert worker.model.record.faults == 1  # a canary that takes too much is to be found out
        worker.model.session._session = session  # noqa: SLF001  the neighbour that took it all has left

        await until_canaries(worker, 2)
        assert not worker.failed.is_set()


@pytest.mark.slow
async def test_an_overloaded_worker_is_kept_though_its_canary_waits_longer_than_any_batch_may_run(
    tmp_path: Path,
) -> None:
    async with watched(tmp_path, timeout_s=1.0, tamper=lingering) as worker, asyncio.timeout(30):
        answers = await asyncio.gather(*(worker.ask(1) for _ in range(40)), return_exceptions=True)

        # The queue was full, and took the canary all the same.
        assert {type(answer) for answer in answers} == {list, OverloadedError}
        await until_canaries(worker, 1)
        assert not worker.failed.is_set()


def lingering(session: Any) -> None:
    """Let each batch take 60 ms, whatever else this machine does: 20 of them take longer than a canary may wait."""
    real = session._session  # noqa: SLF001  the seam to ONNX Runtime

    class Lingering:
        def run(self, *arguments: object) -> object:
            time.sleep(0.06)
            return real.run(*arguments)

    session._session = Lingering()  # noqa: SLF001


@pytest.mark.parametrize(
    ("lanes", "has_canary"),
    [
        pytest.param(1, True, id="while the canary waits"),
        pytest.param(2, True, id="while the canary is answered on another lane"),
        pytest.param(1, False, id="of a model without a canary"),
    ],
)
async def test_a_worker_on_which_a_batch_never_ends_has_failed(tmp_path: Path, lanes: int, has_canary: bool) -> None:
    async with watched(tmp_path, timeout_s=0.2, lanes=lanes, has_canary=has_canary) as worker, asyncio.timeout(10):
        stuck = asyncio.create_task(worker.ask(FOR_EVER))
        await worker.failed.wait()

        stuck.cancel()
        with suppress(asyncio.CancelledError):
            await stuck
