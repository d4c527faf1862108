"""The gRPC server of every service: health, reflection, keepalive, limits, and a drain that loses nothing."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from modelfleet.runtime import telemetry
from modelfleet.runtime.health import Health
from modelfleet.runtime.interceptors import Admission, CallInterceptor
from modelfleet.runtime.metrics_server import CannotListenError, serve_metrics
from modelfleet.runtime.settings import ServerSettings
from modelfleet.runtime.tracing import configure_tracing

_log = structlog.get_logger()

_GIVE_UP_S = 1.0
_NOTICE_S = 2.0
# What gRPC itself would drop unsaid: calls that wait for the event loop, by default those beyond 1,000 at once or 30 s
# old. Here they are answered, or refused in words by `max_concurrent_calls` and by their own deadlines.
_MOST_WAITING_CALLS = 2**31 - 1
_LONGEST_WAIT_S = 3600

READINESS = ""
"""The service of grpc.health.v1 that says whether to send requests here; NOT_SERVING at the end of a drain's delay."""
LIVENESS = "liveness"
"""The service of grpc.health.v1 that says whether the process is worth keeping; SERVING also while it drains."""


class Server:
    """
    A gRPC server on its way from NOT_SERVING to SERVING and back.

    Register servicers on `grpc`, then `start()`; call `set_serving(True)` once requests would be answered and `fail()`
    when none ever will be again. `services` are the full names that health and reflection tell of, besides READINESS
    and LIVENESS.
    """

    def __init__(self, settings: ServerSettings, services: Sequence[str]) -> None:
        self._settings = settings
        self._services = (READINESS, *services)
        self._ending = False
        self._admission = Admission(settings.max_concurrent_calls)
        self._health = Health()
        self.grpc = grpc.aio.server(interceptors=[CallInterceptor(self._admission)], options=_options(settings))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc)
        self.port = 0

    async def start(self) -> None:
        """Listen, alive and NOT_SERVING until told otherwise. Raises CannotListenError."""
        await self.set_serving(serving=False)
        await self._health.set(LIVENESS, _status(serving=True))
        host = self._settings.host
        address = f"{f'[{host}]' if ':' in host else host}:{self._settings.port}"
        try:
            self.port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise CannotListenError(f"Cannot listen on {address}. Is another process using the port?") from error
        await self.grpc.start()
        _log.info("listening", port=self.port)

    async def set_serving(self, *, serving: bool) -> None:
        """Tell health's watchers, overall and for each service. After a drain or a failure nothing changes."""
        if not self._ending:
            for service in self._services:
                await self._health.set(service, _status(serving=serving))

    async def fail(self) -> None:
        """Say NOT_SERVING for good, as LIVENESS too: whatever supervises this process is to start it again."""
        await self.set_serving(serving=False)
        self._ending = True
        await self._health.set(LIVENESS, _status(serving=False))

    async def drain(self, leaving: Callable[[], Awaitable[None]] | None = None) -> None:
        """
        Go on serving for a time, say NOT_SERVING, refuse new calls, let running calls finish, end the rest, stop.

        `leaving` is awaited where health begins to say NOT_SERVING.
        """
        _log.info("draining", delay_s=self._settings.drain_delay_s, timeout_s=self._settings.drain_timeout_s)
        # Clients that know names look them up when a connection reaches its age, and then find the successor. Health
        # would send them nowhere: gRPC does not look a name up for NOT_SERVING. It is for those who know several
        # addresses, and they hear of it at once.
        notice_s = min(_NOTICE_S, self._settings.drain_delay_s)
        await asyncio.sleep(self._settings.drain_delay_s - notice_s)  # a pause that is asked for
        if leaving:
            await leaving()
        await self.set_serving(serving=False)
        self._ending = True
        await asyncio.sleep(notice_s)
        self._admission.draining = True
        deadline = time.monotonic() + self._settings.drain_timeout_s
        # gRPC answers some calls that come while it stops with CANCELLED, which no client retries: it is stopped only
        # once running calls have ended, and refusals come from here until then.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._admission.idle(), self._settings.drain_timeout_s)
        # What still runs is told so: gRPC would only reset its connection.
        self._admission.give_up()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._admission.idle(), _GIVE_UP_S)
        self._health.end_watches()
        await self.grpc.stop(max(0.0, deadline - time.monotonic()))
        _log.info("stopped")


def _status(*, serving: bool) -> "health_pb2.HealthCheckResponse.ServingStatus":
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING


def _options(settings: ServerSettings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.server.max_pending_requests", _MOST_WAITING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_WAITING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", _LONGEST_WAIT_S),
        # gRPC varies the age by a tenth, so that connections made together do not end together.
        # Without a limit of grace, which is cut off mid-call: pushes, downloads and streams of text may take long.
        ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Clients ping too, also between calls; the server must not take that for abuse and close their connections.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        # Two servers on one port would share its connections silently.
        ("grpc.so_reuseport", 0),
    ]


async def until_signalled() -> None:
    """Return at the first SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await stopping.wait()


def run(main: Callable[[], Awaitable[None]], settings: ServerSettings, service: str) -> None:
    """Run a service's `main` on uvloop, with logs and metrics set up, until it returns."""
    telemetry.configure_logging(service, settings.log_level)
    configure_tracing(service)

    async def entry() -> None:
        await main()

    try:
        metrics_port = serve_metrics(settings.host, settings.metrics_port)
        _log.info("metrics", port=metrics_port)
        uvloop.run(entry())
    except CannotListenError as error:
        raise SystemExit(f"The service cannot start: {error.strerror or error}") from None
