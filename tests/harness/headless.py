"""A Deployment behind a headless Service, without a cluster: replicas as processes on addresses of loopback."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Self

from harness.chart import render
from harness.dns import ClusterDns
from harness.processes import ServiceProcess, service_process
from harness.serving import until_serving

Command = Callable[[str], Sequence[str]]
"""From a replica's address to the module that serves and its own flags."""


def replica(_address: str) -> Sequence[str]:
    """Return the command of a replica that answers any call between services, and says which it is."""
    return ("harness.replica",)


@dataclass(frozen=True)
class Timings:
    """How pods of the chart stop, and the age of their connections, in seconds."""

    pre_stop_s: float
    drain_delay_s: float
    connection_age_s: float

    @classmethod
    def of_the_chart(cls) -> Self:
        """Return its defaults."""
        rendered = render()
        variables = rendered.environment("pool-default")
        hook = rendered.container("pool-default").get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        return cls(
            pre_stop_s=hook["sleep"]["seconds"],
            drain_delay_s=float(variables["MODELFLEET_DRAIN_DELAY_S"]),
            connection_age_s=float(variables["MODELFLEET_MAX_CONNECTION_AGE_S"]),
        )


class HeadlessService:
    """Does to its replicas what Kubernetes does to pods, and tells the name server when it would."""

    def __init__(
        self, dns: ClusterDns, name: str, network: int, *, timings: Timings, command: Command, stack: AsyncExitStack
    ) -> None:
        self._dns = dns
        self._name = name
        self._network = network
        self._timings = timings
        self._command = command
        self._stack = stack
        self._port = _free_port()
        self._last = 1
        self._processes: dict[str, ServiceProcess] = {}
        self._ready: tuple[str, ...] = ()
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> str:
        """What clients are told."""
        return self._dns.target(self._name, self._port)

    @property
    def ready(self) -> tuple[str, ...]:
        """The addresses of ready replicas, the oldest first."""
        return self._ready

    async def scale(self, replicas: int) -> None:
        """Return once as many replicas are ready; those that are too many go on ending."""
        while len(self._ready) < replicas:
            self._last += 1
            await self._start(f"127.0.{self._network}.{self._last}")
        for address in self._ready[replicas:]:
            self._end(address)

    async def restart(self) -> None:
        """Replace every replica, as a rollout with one more than wanted and none missing does."""
        for address in self._ready:
            await self.scale(len(self._ready) + 1)
            self._end(address)

    async def kill(self) -> None:
        """End the oldest replica by SIGKILL and start it again on its address, as kubelet does with a container."""
        address = self._ready[0]
        self._processes[address].process.kill()
        self._publish(tuple(other for other in self._ready if other != address))
        await asyncio.to_thread(self._processes[address].process.wait)
        await self._start(address)

    async def ended(self) -> None:
        """Return once all that is to end has ended, with code 0."""
        await asyncio.gather(*self._ending)

    async def _start(self, address: str) -> None:
        flags = (
            *("--host", address, "--port", str(self._port), "--metrics-port", "0"),
            *("--drain-delay-s", str(self._timings.drain_delay_s)),
            *("--max-connection-age-s", str(self._timings.connection_age_s)),
        )
        process = service_process("-m", *self._command(address), *flags)
        self._processes[address] = await asyncio.to_thread(process.__enter__)
        self._stack.push_async_callback(asyncio.to_thread, process.__exit__, None, None, None)
        await until_serving(f"{address}:{self._port}")
        self._publish((*self._ready, address))

    def _publish(self, ready: tuple[str, ...]) -> None:
        self._ready = ready
        self._dns.publish(self._name, ready)

    def _end(self, address: str) -> None:
        """A pod that is deleted leaves the list at once, and hears of it when its preStop hook has ended."""
        self._publish(tuple(other for other in self._ready if other != address))
        self._ending.add(asyncio.create_task(self._stop(self._processes[address])))

    async def _stop(self, service: ServiceProcess) -> None:
        await asyncio.sleep(self._timings.pre_stop_s)
        service.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(service.process.wait) == 0


@asynccontextmanager
async def headless_service(
    dns: ClusterDns, name: str, network: int, command: Command = replica
) -> AsyncIterator[HeadlessService]:
    """Give a Service without replicas; they live in 127.0.`network`, and what still runs at the end is killed."""
    async with AsyncExitStack() as stack:
        yield HeadlessService(dns, name, network, timings=Timings.of_the_chart(), command=command, stack=stack)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
