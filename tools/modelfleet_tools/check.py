"""`modelfleet check`: whether a running cluster serves; what `helm test` runs."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client.client import Client
from modelfleet.client.targets import targets
from modelfleet.runtime.errors import InternalError, ModelfleetError, StateConflictError

from modelfleet_tools.check_model import ANSWERS, TEXTS, write_check_model
from modelfleet_tools.check_pools import wait_until_pool_serves
from modelfleet_tools.health import wait_until_healthy
from modelfleet_tools.options import InferenceOption, JsonOption, ManagerOption
from modelfleet_tools.output import print_json, tell

_MODEL = "modelfleet-check"
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check --json` writes: the worker's providers, requests sent while a pod left, and the pod's name."""

    provider: str
    seconds: float
    requests_during_drain: int
    evicted_pod: str


def check(
    *,
    device: Annotated[
        list[str] | None, typer.Option(help="Accept answers from this device alone: cpu, cuda or tensorrt; repeatable.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DEVICE", help="Require all ready workers of a pool to serve on a device; repeatable."
        ),
    ] = None,
    evict: Annotated[
        str | None,
        typer.Option(metavar="SELECTOR", help="Evict one pod with these labels, and see that no request fails."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Longest time for all of it.")] = 300,
    manager: ManagerOption = None,
    inference: InferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Check a running cluster from end to end: health, a text through all services, the devices that answer, a drain.

    Registers a tiny model of its own for the time that it takes. Ends with 0 only when all is well.

    Example: modelfleet check --device cuda
    """
    started = time.monotonic()
    deadline = started + timeout
    accepted = {_provider(name, "--device") for name in device or ()}
    pools = {name: _provider(of_pool, "--pool") for name, _, of_pool in (each.partition("=") for each in pool or ())}
    for service, target in targets(inference, None, manager).items():
        wait_until_healthy(target, deadline)
        tell(f"The {service} service at {target} is healthy.")
    with Client(inference=inference, manager=manager) as client, _served_model(client, deadline) as number:
        provider = client.wait_until_served(_MODEL, timeout_s=_left(deadline)).providers[0]
        if accepted and provider not in accepted:
            raise StateConflictError(f"The worker answers on {provider}, not on {' or '.join(sorted(accepted))}.")
        _ask(client)
        tell(f"A text went through all services and was answered on {provider}.")
        for name, wanted in pools.items():
            ready = wait_until_pool_serves(client, name, wanted, f"{_MODEL}@{number}", deadline)
            tell(f"Pool {name}: {ready} ready workers serve on {wanted}.")
        evicted, requests = _drain(client, evict, deadline) if evict else ("", 0)
    report = CheckReport(provider, time.monotonic() - started, requests, evicted)
    if as_json:
        print_json(report)
    tell(f"All is well, in {report.seconds:.1f} s.")


def _provider(device: str, option: str) -> str:
    if device not in _PROVIDERS:
        raise typer.BadParameter(f"{option} has the device {device!r}. Give one of {', '.join(_PROVIDERS)}.")
    return _PROVIDERS[device]


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


@contextmanager
def _served_model(client: Client, deadline: float) -> Iterator[int]:
    """Register the model, give the number of its version, and delete it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        write_check_model(Path(folder))
        bundle, paths = open_directory(Path(folder))
        number = client.push(
            bundle, paths, _MODEL, alias="stable", timeout_s=_left(deadline)
        ).model_version.model_version
    try:
        yield number
    finally:
        client.delete_alias(_MODEL, "stable")
        client.delete_model_version(_MODEL, number)


def _ask(client: Client) -> None:
    vectors = client.embed(_MODEL, TEXTS).vectors
    if not np.allclose(vectors, ANSWERS, atol=1e-2):
        raise InternalError(f"The answer is {vectors.tolist()} and should be {ANSWERS.tolist()}.")


def _drain(client: Client, selector: str, deadline: float) -> tuple[str, int]:
    """Evict a pod while requests are sent; return its name and the number of requests, none of which failed."""
    from modelfleet_tools.eviction import evict_one  # noqa: PLC0415  its client takes a while to import

    asking = _Asking(lambda: _ask(client))
    with asking:
        pod = evict_one(selector, _left(deadline))
    tell(f"{pod} drained under {asking.count} requests, and none failed.")
    return pod, asking.count


class _Asking:
    """Sends requests from a thread during its context, and raises at the end what one of them raised."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._stop = threading.Event()
        self._error: ModelfleetError | None = None
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._ask()
            except ModelfleetError as error:
                self._error = error
                return
            self.count += 1
