"""
Whether this worker is worth keeping: canary requests at intervals, and errors after which the device is of no use.

A worker that fails here says NOT_SERVING for good, as liveness too, and is started again by whatever supervises it. One
that is merely overloaded stays: its canary waits like any request, and as long as batches end, waiting is no failure.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from modelfleet.inference import metrics
from modelfleet.inference.canary import Canary
from modelfleet.inference.engine import Engine
from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.models import HeldModel
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.states import VersionState
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import FatalDeviceError, ModelfleetError, UnavailableError

_log = structlog.get_logger()

# A canary that fails once is asked again at once: the reason may have been a neighbour that took all memory.
_TRIES = 2


class Runner(Protocol):
    """What runs requests: the engine, or a generative model's own."""

    batches_ended: int

    def longest_run_s(self) -> float:
        """Return for how long the oldest batch of callers that runs now has been running, in seconds."""


class Health:
    """
    Watches the versions that are READY.

    `interval_s` is the pause between two rounds of canaries. A batch that runs for `timeout_s`, or a canary that waits
    that long while no batch ends, is stuck. `fail` is awaited once, when the worker has failed.
    """

    def __init__(
        self,
        served: ServedModels,
        engine: Engine,
        fail: Callable[[], Awaitable[None]],
        *,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self._served = served
        self._engine = engine
        self._fail = fail
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        engine.on_fatal_error(self._device_failed)

    async def run(self) -> None:
        """Watch until the worker fails or the task is cancelled."""
        rounds = asyncio.create_task(self._rounds(), name="canaries")
        rounds.add_done_callback(self._rounds_ended)
        try:
            reason = await self._failed
        finally:
            rounds.cancel()
        _log.critical("the worker failed; NOT_SERVING until it is started again", reason=reason)
        await self._fail()

    def _device_failed(self, error: FatalDeviceError) -> None:
        self._failed_for(f"the device failed: {error.__cause__ or error}")

    def _failed_for(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_result(reason)

    def _rounds_ended(self, rounds: asyncio.Task[None]) -> None:
        # Canaries that are no longer sent would leave a worker that is never found out.
        if not rounds.cancelled() and (error := rounds.exception()):
            self._failed_for(f"canaries cannot be sent: {error!r}")

    async def _rounds(self) -> None:
        while self._interval_s:
            await asyncio.sleep(self._interval_s)
            self._check_runs(self._engine)
            for version in self._served.versions():
                if version.state is VersionState.READY and version.model and version.model.canary:
                    await self._check(version, version.model, version.model.canary)

    def _check_runs(self, engine: Runner) -> None:
        if (running_s := engine.longest_run_s()) > self._timeout_s:
            self._failed_for(f"a batch has been running for {running_s:.0f} s")

    async def _check(self, version: ServedVersion, model: HeldModel, canary: Canary) -> None:
        wrong = ""
        for _ in range(_TRIES):
            try:
                with self._served.hold(version):
                    difference = canary.difference(await self._answer(model, canary))
            except UnavailableError:  # it drains, or the device has failed, of which the engine has told
                return
            except ModelfleetError as error:
                outcome, wrong = "failed", f"failed: {error.__cause__ or error}"
            else:
                if difference <= canary.tolerance:
                    metrics.CANARIES.labels("answered").inc()
                    return
                outcome, wrong = "differed", f"differs from its first answer by {difference:.3g} of its magnitude"
            metrics.CANARIES.labels(outcome).inc()
            _log.warning("canary", version=str(version.key), outcome=outcome, reason=wrong)
        self._failed_for(f"the canary of {version.key} {wrong}")

    async def _answer(self, model: HeldModel, canary: Canary) -> list[Array]:
        """Return the canary's answer, however long the queue is, while the engine shows signs of life."""
        engine: Runner = model.decoding if isinstance(model, GenerativeModel) else self._engine
        answer = asyncio.create_task(canary.trial.run(model, self._engine))
        try:
            while not answer.done():
                ended = engine.batches_ended
                await asyncio.wait((answer,), timeout=self._timeout_s)
                if answer.done():
                    break
                self._check_runs(engine)
                if engine.batches_ended == ended:
                    self._failed_for(f"no batch has ended for {self._timeout_s:g} s while a canary waits")
        finally:
            answer.cancel()
        return answer.result()
