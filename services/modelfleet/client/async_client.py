"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
from google.protobuf.message import Message

from modelfleet.client import (
    generation_calls,
    inference_calls,
    manager_calls,
    pool_calls,
    rollout_calls,
    served_model_calls,
    storage_calls,
    tokenizer_calls,
)
from modelfleet.client.channel import DEFAULT_MAX_MESSAGE_BYTES, open_async_channel
from modelfleet.client.errors import from_call
from modelfleet.client.generation_calls import GeneratedChunk, Stream, chunk
from modelfleet.client.steps import (
    AT_ONCE,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TRIES_WHEN_FULL,
    All,
    Ask,
    Messages,
    Method,
    Pause,
    Procedure,
    Service,
    Step,
    TriesWhenFull,
    Upload,
    bounded,
    present,
)
from modelfleet.client.targets import targets
from modelfleet.runtime.errors import ModelfleetError, StateConflictError

P = ParamSpec("P")
R = TypeVar("R")


def _awaiting(procedure: Callable[P, Procedure[R]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, R]]:
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(procedure(*args, **kwargs))

    present(method, procedure)
    return method


def _streaming(
    begin: Callable[P, Stream],
) -> Callable[Concatenate["AsyncClient", P], AsyncGenerator[GeneratedChunk, None]]:
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[GeneratedChunk, None]:
        return self._stream(begin(*args, **kwargs))

    present(method, begin)
    return method


class AsyncClient:
    """
    Calls modelfleet's services from asyncio: `Client` with every method awaited. To be used in one event loop.

    A call that is cancelled is cancelled in the service too.
    """

    def __init__(
        self,
        *,
        inference: str | None = None,
        tokenizer: str | None = None,
        manager: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tries_when_full: int = DEFAULT_TRIES_WHEN_FULL,
    ) -> None:
        bounded(timeout_s)
        self._timeout_s = timeout_s
        self._closed = False
        self._tries_when_full = tries_when_full
        self._targets = targets(inference, tokenizer, manager)
        self._max_message_bytes = max_message_bytes
        self._channels: dict[Service, grpc.aio.Channel] = {}
        self._callables: dict[Method[Any], grpc.aio.UnaryUnaryMultiCallable[Any, Any]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Calls under way fail."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()

    embed = _awaiting(inference_calls.embed)
    classify = _awaiting(inference_calls.classify)
    extract_entities = _awaiting(inference_calls.extract_entities)
    rerank = _awaiting(inference_calls.rerank)
    infer = _awaiting(inference_calls.infer)
    generate = _streaming(generation_calls.generate)
    served_models = _awaiting(served_model_calls.served_models)
    wait_until_served = _awaiting(served_model_calls.wait_until_served)
    tokenize = _awaiting(tokenizer_calls.tokenize)
    detokenize = _awaiting(tokenizer_calls.detokenize)
    models = _awaiting(manager_calls.models)
    get_model = _awaiting(manager_calls.get_model)
    model_versions = _awaiting(manager_calls.model_versions)
    get_model_version = _awaiting(manager_calls.get_model_version)
    push = _awaiting(manager_calls.push)
    set_alias = _awaiting(manager_calls.set_alias)
    place_model = _awaiting(manager_calls.place_model)
    delete_alias = _awaiting(manager_calls.delete_alias)
    delete_model_version = _awaiting(manager_calls.delete_model_version)
    pools = _awaiting(pool_calls.pools)
    get_pool = _awaiting(pool_calls.get_pool)
    scale_pool = _awaiting(pool_calls.scale_pool)
    start_rollout = _awaiting(rollout_calls.start_rollout)
    get_rollout = _awaiting(rollout_calls.get_rollout)
    rollouts = _awaiting(rollout_calls.rollouts)
    promote_rollout = _awaiting(rollout_calls.promote_rollout)
    abort_rollout = _awaiting(rollout_calls.abort_rollout)
    collect_garbage = _awaiting(storage_calls.collect_garbage)
    check_blobs = _awaiting(storage_calls.check_blobs)

    async def _run(self, procedure: Procedure[R]) -> R:
        try:
            step = next(procedure)
            while True:
                try:
                    outcome = await self._perform(step)
                except ModelfleetError as error:
                    step = procedure.throw(error)
                else:
                    step = procedure.send(outcome)
        except StopIteration as done:
            result: R = done.value
            return result

    async def _perform(self, step: Step) -> object:
        match step:
            case Ask():
                return await self._ask(step)
            case All():
                return await self._run_all(step.procedures)
            case Upload():
                return await self._upload(step)
            case Pause():
                await asyncio.sleep(step.seconds)
                return None
            case TriesWhenFull():
                return self._tries_when_full

    def _seconds(self, timeout_s: float | None) -> float | None:
        """Return how long a call may take. Raises StateConflictError for a client that was closed."""
        if self._closed:
            raise StateConflictError("This client is closed. Make another one, or close it later.")
        return bounded(self._timeout_s if timeout_s is None else timeout_s)

    async def _ask(self, call: Ask) -> object:
        try:
            return await self._callable(call.method)(
                call.request,
                timeout=self._seconds(call.timeout_s),
                wait_for_ready=call.wait_for_ready,
                metadata=call.metadata,
            )
        except grpc.RpcError as error:
            raise from_call(error, call.method.service, self._targets[call.method.service]) from error

    async def _run_all(self, procedures: Iterable[Procedure[Any]]) -> list[object]:
        places = asyncio.Semaphore(AT_ONCE)

        async def run(procedure: Procedure[Any]) -> object:
            async with places:
                return await self._run(procedure)

        tasks = [asyncio.create_task(run(procedure)) for procedure in procedures]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(self, stream: Stream) -> AsyncGenerator[GeneratedChunk, None]:
        service = stream.method.service
        send: grpc.aio.UnaryStreamMultiCallable[Any, Any] = self._channel(service).unary_stream(
            stream.method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=stream.method.response.FromString,
        )
        call = send(stream.request, timeout=self._seconds(stream.timeout_s))
        try:
            async for message in call:
                yield chunk(message)
        except grpc.RpcError as error:
            raise from_call(error, service, self._targets[service]) from error
        finally:
            call.cancel()

    async def _upload(self, step: Upload) -> object:
        send: grpc.aio.StreamUnaryMultiCallable[Any, Any] = self._channel(step.method.service).stream_unary(
            step.method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=step.method.response.FromString,
        )
        try:
            response = await send(_off_the_loop(step.messages), timeout=self._seconds(step.timeout_s))
        except grpc.RpcError as error:
            step.messages.check()
            raise from_call(error, step.method.service, self._targets[step.method.service]) from error
        step.messages.check()
        return response

    def _callable(self, method: Method[Any]) -> "grpc.aio.UnaryUnaryMultiCallable[Any, Any]":
        known = self._callables.get(method)
        if known is None:
            known = self._callables[method] = self._channel(method.service).unary_unary(
                method.path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=method.response.FromString,
            )
        return known

    def _channel(self, service: Service) -> grpc.aio.Channel:
        # Opened on first use, which is in the event loop that it will belong to; the constructor may run before it.
        if service not in self._channels:
            self._channels[service] = open_async_channel(
                self._targets[service], max_message_bytes=self._max_message_bytes
            )
        return self._channels[service]


async def _off_the_loop(messages: Messages) -> AsyncIterator[Message]:
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
