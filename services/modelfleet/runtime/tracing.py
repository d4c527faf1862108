"""
Traces by OpenTelemetry: a span for each call, below the caller's own, and below that for its stages.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT, or its like for traces, says where a collector takes OTLP over gRPC; the other
standard variables hold, too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_OK = 0

_tracer: Tracer | None = None


def configure_tracing(service: str) -> None:
    """Send spans where the environment says, if it does. To be called once in a process."""
    global _tracer  # noqa: PLW0603  one process has one provider of tracers
    if not any(os.environ.get(name) for name in _ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED") == "true":
        return
    # Only now: importing it takes a while.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"modelfleet-{service}"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("modelfleet")


def start_call(method: str, metadata: Mapping[str, str | bytes]) -> Span | None:
    """
    Begin the span of a call, such as `/package.Service/Method`, and let what follows in this task be part of it.

    https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
    """
    if _tracer is None:
        return None
    from opentelemetry import context, propagate, trace  # noqa: PLC0415

    name = method.removeprefix("/")
    service, _, rpc = name.partition("/")
    span = _tracer.start_span(
        name,
        context=propagate.extract({key: value for key, value in metadata.items() if isinstance(value, str)}),
        kind=trace.SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc},
    )
    context.attach(trace.set_span_in_context(span))
    return span


def end_call(span: Span | None, code: int, attributes: Iterable[tuple[str, str]]) -> None:
    """End the span of a call with its gRPC status code."""
    if span is None:
        return
    from opentelemetry import trace  # noqa: PLC0415

    span.set_attribute("rpc.grpc.status_code", code)
    for key, value in attributes:
        span.set_attribute(key, value)
    if code != _OK:
        span.set_status(trace.StatusCode.ERROR)
    span.end()


def record_stage(name: str, started: float, ended: float, **attributes: float) -> None:
    """Record a stage of the current call that lasted from `started` to `ended`, in seconds on the monotonic clock."""
    if _tracer is None or not trace_id():  # no call's: the worker's own requests are no traces
        return
    now, now_ns = time.monotonic(), time.time_ns()
    named = {f"modelfleet.{key}": value for key, value in attributes.items()}
    span = _tracer.start_span(name, start_time=now_ns - int((now - started) * 1e9), attributes=named)
    span.end(now_ns - int((now - ended) * 1e9))


def current_trace() -> Context | None:
    """Return what `follow_trace` takes, so that a shared task works for one call after another."""
    if _tracer is None:
        return None
    from opentelemetry import context  # noqa: PLC0415

    return context.get_current()


def follow_trace(trace: Context | None) -> None:
    """Let what follows in this task be part of the call in which `current_trace` was asked."""
    if trace is None:
        return
    from opentelemetry import context  # noqa: PLC0415

    context.attach(trace)


def outgoing_trace() -> tuple[tuple[str, str], ...]:
    """Return the metadata that makes the next service's spans part of the current call."""
    if _tracer is None:
        return ()
    from opentelemetry import propagate  # noqa: PLC0415

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def trace_id() -> str:
    """Return the current call's trace id, 32 hexadecimal digits; empty where it is in no trace."""
    if _tracer is None:
        return ""
    from opentelemetry import trace  # noqa: PLC0415

    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""
