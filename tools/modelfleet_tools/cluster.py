"""The three services as three processes on this machine: for `up`, `demo`, tests and measurements."""

import asyncio
import fcntl
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modelfleet.runtime.errors import StateConflictError, UnavailableError

from modelfleet_tools.service_process import ServiceProcess

_POLL_S = 0.05
_POOL = "default"
# For clients that balance over replicas to hear that one leaves.
_DRAIN_DELAY_S = "1"


class Service(StrEnum):
    """A service, in the order in which they start: each needs the address of those before it."""

    MANAGER = "manager"
    TOKENIZER = "tokenizer"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services listen, as `host:port`; several workers are one target of gRPC that names them all."""

    manager: str
    tokenizer: str
    inference: str


class LocalCluster:
    """
    A manager, tokenizers and workers, each a process of its own; their data and logs are kept in `data_dir`.

    Starts on entering the context, which waits until each says that it is serving, and stops on leaving it. A service
    that is restarted keeps its port. Blocking; the asynchronous context runs the same in a thread.

    `ports` and `metrics_ports` that are missing or 0 are picked free. `flags` are added to a service's command line.
    Of several `tokenizers` and `workers` the first goes by its service's name, the others are `inference-2` and so on.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        device: str = "cpu",
        host: str = "127.0.0.1",
        ports: Mapping[Service, int] = MappingProxyType({}),
        metrics_ports: Mapping[Service, int] = MappingProxyType({}),
        flags: Mapping[Service, Sequence[str]] = MappingProxyType({}),
        tokenizers: int = 1,
        workers: int = 1,
        start_timeout_s: float = 60,
        stop_timeout_s: float = 40,
    ) -> None:
        self.data_dir = data_dir
        self._pool_dir = data_dir / "pool"
        self._device = device
        self._host = host
        self._flags = flags
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        replicas = {Service.MANAGER: 1, Service.TOKENIZER: tokenizers, Service.INFERENCE: workers}
        self._names: tuple[str, ...] = tuple(
            name
            for service in Service
            for name in (service, *(f"{service}-{number}" for number in range(2, replicas[service] + 1)))
        )
        self._ports: dict[str, int] = dict.fromkeys(self._names, 0) | dict(ports)
        self._metrics_ports: dict[str, int] = dict.fromkeys(self._names, 0) | dict(metrics_ports)
        self._children: dict[str, ServiceProcess] = {}
        self._lock: IO[str] | None = None
        self.exit_codes: dict[str, int] = {}
        """How the services ended that `stop` ended."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)

    @property
    def addresses(self) -> Addresses:
        """Where the services listen."""
        return Addresses(*(self._target(service) for service in Service))

    def metrics_url(self, service: str) -> str:
        """Return the URL of a service's Prometheus metrics."""
        return f"http://{self._reachable_host}:{self._metrics_ports[service]}/metrics"

    def log_path(self, service: str) -> Path:
        """Return the file that a service's log lines are appended to."""
        return self.data_dir / "logs" / f"{service}.log"

    def pid(self, service: str) -> int:
        """Return the process id of a service."""
        return self._children[service].process.pid

    def start(self) -> None:
        """
        Start the services and wait until all are serving.

        Raises UnavailableError, with the last lines of its log, when one exits or is not serving in time, and
        StateConflictError when another cluster uses the data directory. Whatever was started is stopped then.
        """
        self._lock_data_dir()
        self._pool_dir.mkdir(exist_ok=True)
        (self._pool_dir / "wanted.json").write_text(json.dumps({"pool": _POOL, "replicas": len(self._workers())}))
        self._tell_running()
        try:
            deadline = time.monotonic() + self._start_timeout_s
            for name in self._names:
                self._spawn(name, deadline)
            for name in self._names:
                self._wait_until_serving(name, deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> Mapping[str, int]:
        """
        End every service by SIGTERM, those first that others do not need, and return the exit codes.

        A service that has not drained in time is killed; its exit code is -9.
        """
        try:
            for name in reversed(self._names):
                if child := self._children.get(name):
                    child.terminate(self._stop_timeout_s)
        finally:  # also when a second Ctrl-C ends the wait
            for child in self._children.values():
                child.process.kill()
            if self._lock:
                self._lock.close()
                self._lock = None
        self.exit_codes |= {service: child.process.wait() for service, child in self._children.items()}
        self._children.clear()
        return self.exit_codes

    def kill(self, service: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a service."""
        self._children[service].process.send_signal(number)

    def wait_for_exit(self, service: str, timeout_s: float = 40) -> int:
        """Return the exit code of a service once it is gone. Raises subprocess.TimeoutExpired."""
        return self._children[service].process.wait(timeout_s)

    def restart(self, service: str) -> None:
        """End a service if it still runs, start it on the same port, and wait until it is serving."""
        self._children[service].terminate(self._stop_timeout_s)
        deadline = time.monotonic() + self._start_timeout_s
        self._spawn(service, deadline)
        self._wait_until_serving(service, deadline)

    def watch(self, scaled: Callable[[], None] = lambda: None) -> None:
        """
        Block while all services run, start and stop workers as ScalePool asks for, and call `scaled` after each time.

        Raises UnavailableError, with the last lines of its log, when a service exits by itself.
        """
        while True:
            for name in self._names:
                self._check_alive(name)
            if self._scale():
                scaled()
            time.sleep(4 * _POLL_S)

    def _scale(self) -> bool:
        """Have as many workers as the manager has written down; return whether that changed anything."""
        wanted = json.loads((self._pool_dir / "wanted.json").read_text())["replicas"]
        workers = self._workers()
        for number in range(len(workers) + 1, wanted + 1):
            name = f"{Service.INFERENCE}-{number}"
            self._ports[name] = self._metrics_ports[name] = 0
            deadline = time.monotonic() + self._start_timeout_s
            self._spawn(name, deadline)
            self._names += (name,)
            self._tell_running()
            self._wait_until_serving(name, deadline)
        for name in reversed(workers[wanted:]):
            self._names = tuple(other for other in self._names if other != name)
            self._children.pop(name).terminate(self._stop_timeout_s)
            self._tell_running()
        return bool(wanted != len(workers))

    def _workers(self) -> list[str]:
        return [name for name in self._names if _service(name) is Service.INFERENCE]

    def _tell_running(self) -> None:
        """Write the workers' names down for the manager, which sees the old file or the new."""
        written = self._pool_dir / "running.new"
        written.write_text(json.dumps([_worker(name) for name in self._workers()]))
        written.replace(self._pool_dir / "running.json")

    @property
    def _reachable_host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104  compared
        return f"[{host}]" if ":" in host else host

    def _address(self, service: str) -> str:
        return f"{self._reachable_host}:{self._ports[service]}"

    def _target(self, service: Service) -> str:
        """Return the address of a service, or those of its replicas for a client to balance over."""
        first, *others = [self._address(name) for name in self._names if _service(name) is service]
        scheme = "ipv6" if first.startswith("[") else "ipv4"
        return f"{scheme}:{','.join((first, *others))}" if others else first

    def _command(self, name: str) -> list[str]:
        service = _service(name)
        own = {
            Service.MANAGER: ["--data-dir", str(self.data_dir / "manager"), "--local-pool", str(self._pool_dir)],
            Service.TOKENIZER: [
                *("--manager", self._address(Service.MANAGER)),
                *("--cache-dir", str(self.data_dir / name)),
            ],
            Service.INFERENCE: [
                *("--manager", self._address(Service.MANAGER)),
                *("--tokenizer", self._target(Service.TOKENIZER)),
                *("--cache-dir", str(self.data_dir / name)),
                *("--device", self._device, "--pool", _POOL),
                *("--worker", _worker(name)),
            ],
        }
        return [
            *(sys.executable, "-m", f"modelfleet.{service.value}", "--host", self._host),
            *("--port", str(self._ports[name]), "--metrics-port", str(self._metrics_ports[name])),
            *("--drain-delay-s", _DRAIN_DELAY_S if "," in self._target(service) else "0"),
            *own[service],
            *self._flags.get(service, ()),
        ]

    def _spawn(self, service: str, deadline: float) -> None:
        child = self._children[service] = ServiceProcess(self._command(service), self.log_path(service))
        while None in (port := child.logged_port("listening"), metrics_port := child.logged_port("metrics")):
            self._check_alive(service)
            self._check_time(service, deadline)
            time.sleep(_POLL_S)
        assert port is not None
        assert metrics_port is not None
        self._ports[service], self._metrics_ports[service] = port, metrics_port

    def _wait_until_serving(self, service: str, deadline: float) -> None:
        with grpc.insecure_channel(self._address(service)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not _is_serving(health):
                self._check_alive(service)
                self._check_time(service, deadline)
                time.sleep(_POLL_S)

    def _check_alive(self, service: str) -> None:
        child = self._children[service]
        if (code := child.process.poll()) is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            raise UnavailableError(f"The {service} {how}. {self._told(service)}")

    def _check_time(self, service: str, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"The {service} is not serving {self._start_timeout_s:g} s after the start. {self._told(service)}"
            )

    def _told(self, service: str) -> str:
        lines = self._children[service].last_lines()
        return "\n  ".join((f"Its log, {self.log_path(service)}, ends:", *lines))

    def _lock_data_dir(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.data_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise StateConflictError(
                f"Another cluster uses {self.data_dir}. Stop it, or choose another directory with --data-dir."
            ) from error
        self._lock = lock


def _worker(name: str) -> str:
    return f"{_POOL}-{name.partition('-')[2] or 1}"


def _service(name: str) -> Service:
    return Service(name.partition("-")[0])


def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        response = health.Check(health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True)
    except grpc.RpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
