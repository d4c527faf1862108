"""Logs and metrics: JSON lines on standard error, what Prometheus counts, one request id through all."""

import logging
import re
import secrets
import sys
from contextvars import ContextVar

import prometheus_client
import structlog

from modelfleet.runtime.tracing import outgoing_trace, trace_id

REQUEST_ID_HEADER = "x-request-id"
LONGEST_REQUEST_ID = 512
_REQUEST_ID = re.compile(rf"[!-~]{{1,{LONGEST_REQUEST_ID}}}")
request_id: ContextVar[str] = ContextVar("request_id", default="")

# From 0.5 ms to a minute, about 2x apart: short enough for a cache hit, long enough for a queue under overload.
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)

RPC_SECONDS = prometheus_client.Histogram(
    "modelfleet_rpc_seconds", "Time from the arrival of a call to its status.", ["method", "code"],
    buckets=LATENCY_BUCKETS_S,
)  # fmt: skip
RPC_IN_FLIGHT = prometheus_client.Gauge("modelfleet_rpc_in_flight", "Calls under way.")
REJECTIONS = prometheus_client.Counter(
    "modelfleet_rejections_total", "Calls answered with an error, by its reason.", ["reason"]
)


def new_request_id() -> str:
    """Return 16 random hexadecimal digits."""
    return secrets.token_hex(8)


def accepted_request_id(given: str) -> str:
    """Return a caller's id where it can travel on beside others: printable ASCII, not long. Otherwise a new one."""
    return given if _REQUEST_ID.fullmatch(given) else new_request_id()


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries the current request id and trace to the next service."""
    current = request_id.get()
    return (((REQUEST_ID_HEADER, current),) if current else ()) + outgoing_trace()


def configure_logging(service: str, level: str) -> None:
    """Send structlog's events and the standard library's records as JSON lines to standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_ids,
        # Without local variables: they hold the texts of users.
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    structlog.contextvars.bind_contextvars(service=service)


def _add_ids(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if current := request_id.get():
        event.setdefault("request_id", current)
    if current := trace_id():
        event.setdefault("trace_id", current)
    return event
