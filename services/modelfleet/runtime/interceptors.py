"""What happens around every call: a request id, bounded concurrency, errors mapped to statuses, metrics, a log line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import grpc
import structlog

from modelfleet.runtime import telemetry
from modelfleet.runtime.affinity import AFFINITY_HEADER, affinity_key
from modelfleet.runtime.deadlines import ran_out
from modelfleet.runtime.errors import DrainingError, InternalError, ModelfleetError, OverloadedError
from modelfleet.runtime.status import pushback, to_status
from modelfleet.runtime.tracing import end_call, start_call

_log = structlog.get_logger()

# The caller left or its deadline passed, or the process ends.
_ENDINGS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
# Infrastructure's own calls: answered while draining and at the limit of calls, not counted, not logged.
_UNGUARDED = (
    "/grpc.health.v1.",
    "/grpc.reflection.",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Admission:
    """Decides whether one more call may start, and counts those under way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._calls: set[asyncio.Task[Any] | None] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.given_up = False

    async def idle(self) -> None:
        """Return once no call is under way."""
        await self._idle.wait()

    def give_up(self) -> None:
        """End the calls that are still under way: they fail with DrainingError."""
        self.given_up = True
        for call in self._calls:
            if call:
                call.cancel()

    def reason(self, error: BaseException) -> BaseException:
        """Return why a call ended that ended with an error."""
        if self.given_up and isinstance(error, asyncio.CancelledError):
            return DrainingError("The server shut down before this call had ended. Retry on another replica.")
        return error

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a call while it runs. Raises DrainingError or OverloadedError instead of letting it in."""
        if self.draining:
            raise DrainingError("The server is shutting down. Retry on another replica.")
        if self._in_flight >= self._limit:
            raise OverloadedError(
                f"The server has {self._in_flight} calls under way, as many as max_concurrent_calls allows. Retry."
            )
        call = asyncio.current_task()
        self._calls.add(call)
        self._in_flight += 1
        self._idle.clear()
        telemetry.RPC_IN_FLIGHT.set(self._in_flight)
        try:
            yield
        finally:
            self._calls.discard(call)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            telemetry.RPC_IN_FLIGHT.set(self._in_flight)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handler of every method; handlers are coroutines (unary) or async generators (streaming)."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of the called method, made once for each method."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(_UNGUARDED):
            return handler
        wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        # grpc sets exactly one of the four behaviours; the maker for it has the same name and suffix.
        for kind in ("unary_unary", "stream_unary"):
            if behaviour := getattr(handler, kind):
                return self._remade(kind, handler, self._single(method, behaviour))
        for kind in ("unary_stream", "stream_stream"):
            if behaviour := getattr(handler, kind):
                return self._remade(kind, handler, self._streaming(method, behaviour))
        raise AssertionError(f"{method} has no behaviour")

    @staticmethod
    def _remade(kind: str, handler: Handler, behaviour: object) -> Handler:
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return cast(
            "Handler",
            make(
                behaviour,
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            ),
        )

    def _single(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: object, context: Context) -> object:
            observed = _Call(method, context)
            try:
                with self._admission.admit():
                    response = await behaviour(request, context)
            except BaseException as error:  # noqa: BLE001  every end of a call is recorded; `failed` raises again
                await observed.failed(self._admission.reason(error))
            observed.succeeded()
            return response

        return call

    def _streaming(
        self, method: str, behaviour: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def call(request: object, context: Context) -> AsyncIterator[Any]:
            observed = _Call(method, context)
            try:
                with self._admission.admit():
                    async for response in behaviour(request, context):
                        yield response
            except BaseException as error:  # noqa: BLE001  every end of a call is recorded; `failed` raises again
                await observed.failed(self._admission.reason(error))
            observed.succeeded()

        return call


class _Call:
    """One call: its request id, its affinity key, and its end."""

    def __init__(self, method: str, context: Context) -> None:
        self._method = method
        self._context = context
        self._started = time.perf_counter()
        metadata = dict(context.invocation_metadata() or ())
        self._request_id = telemetry.accepted_request_id(str(metadata.get(telemetry.REQUEST_ID_HEADER, "")))
        telemetry.request_id.set(self._request_id)
        affinity_key.set(str(metadata.get(AFFINITY_HEADER, "")))
        self._span = start_call(method, metadata)

    def succeeded(self) -> None:
        self._record(grpc.StatusCode.OK)
        _log.debug("call", method=self._method, code="OK")

    async def failed(self, error: BaseException) -> None:
        """Record the failure and end the call with the status that tells of it."""
        if isinstance(error, grpc.aio.AbortError):
            self._record(self._context.code())
            raise error
        if isinstance(error, _ENDINGS):
            self._record(grpc.StatusCode.DEADLINE_EXCEEDED if self._ran_out() else grpc.StatusCode.CANCELLED)
            raise error
        # Any other BaseException is a panic of an extension written in Rust; grpc would leave its caller waiting.
        if not isinstance(error, ModelfleetError):
            _log.error("call failed", method=self._method, exc_info=error)
            error = InternalError(f"Internal error. The server's log has it under request id {self._request_id}.")
        elif isinstance(error.__cause__, Exception):
            _log.warning("call failed", method=self._method, reason=error.reason, exc_info=error.__cause__)
        status = to_status(error, self._request_id)
        telemetry.REJECTIONS.labels(error.reason.value).inc()
        self._record(status.code, error.reason.value)
        _log.info(
            "call refused", method=self._method, code=status.code.name, reason=error.reason, message=status.details
        )
        await self._context.abort(status.code, status.details, (*status.trailing_metadata, *pushback(error)))

    def _ran_out(self) -> bool:
        left_s = self._context.time_remaining()
        return left_s is not None and ran_out(time.perf_counter() - self._started, left_s)

    def _record(self, code: grpc.StatusCode, reason: str = "") -> None:
        elapsed = time.perf_counter() - self._started
        telemetry.RPC_SECONDS.labels(self._method, code.name).observe(elapsed)
        ids = {"modelfleet.request_id": self._request_id} | ({"modelfleet.reason": reason} if reason else {})
        end_call(self._span, code.value[0], ids.items())
