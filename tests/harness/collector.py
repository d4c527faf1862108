"""A collector of traces: takes OTLP over gRPC, as any does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A span as it arrived; ids are bytes, times nanoseconds since the epoch."""

    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what arrives."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._arrived = asyncio.Condition()

    async def Export(  # noqa: N802  as in the contract
        self, request: pb.ExportTraceServiceRequest, _context: object
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = next(one.value.string_value for one in resource.resource.attributes if one.key == "service.name")
            self.spans += [_span(service, span) for scope in resource.scope_spans for span in scope.spans]
        async with self._arrived:
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    async def trace(self, trace_id: bytes, *, spans: int) -> list[Span]:
        """Return a trace's spans in order of their start, once there are as many."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.trace_id == trace_id]

        async with asyncio.timeout(30), self._arrived:
            await self._arrived.wait_for(lambda: len(found()) >= spans)
        return sorted(found(), key=lambda span: span.start_ns)


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    """Run a collector until the block ends; gives its URL, too."""
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)


def _span(service: str, span: Any) -> Span:
    attributes = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
    return Span(
        service,
        span.name,
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        attributes,
        span.status.code == span.status.STATUS_CODE_ERROR,
    )
