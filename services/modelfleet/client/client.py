"""The client for threads."""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc

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
from modelfleet.client.channel import DEFAULT_MAX_MESSAGE_BYTES, open_channel
from modelfleet.client.errors import from_call
from modelfleet.client.generation_calls import GeneratedChunk, Stream, chunk
from modelfleet.client.steps import (
    AT_ONCE,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TRIES_WHEN_FULL,
    All,
    Ask,
    Method,
    Pause,
    Procedure,
    Step,
    TriesWhenFull,
    Upload,
    bounded,
    present,
)
from modelfleet.client.targets import targets
from modelfleet.runtime.errors import InternalError, ModelfleetError, StateConflictError

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(procedure: Callable[P, Procedure[R]]) -> Callable[Concatenate["Client", P], R]:
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(procedure(*args, **kwargs))

    present(method, procedure)
    return method


def _streaming(begin: Callable[P, Stream]) -> Callable[Concatenate["Client", P], Generator[GeneratedChunk, None, None]]:
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Generator[GeneratedChunk, None, None]:
        return self._stream(begin(*args, **kwargs))

    present(method, begin)
    return method


class Client:
    """
    Calls modelfleet's services and blocks until they answer. May be shared by threads.

    `inference`, `tokenizer` and `manager` are gRPC targets. Without them, the environment's `MODELFLEET_INFERENCE`,
    `MODELFLEET_TOKENIZER` and `MODELFLEET_MANAGER` hold, or else localhost:8001, :8002 and :8003. A target
    `dns:///name:port` balances over all addresses of the name. A call's own `timeout_s` is for all of it; without one,
    each request that it makes has the client's. UNAVAILABLE is tried again within it, and what a full
    queue refuses is sent up to `tries_when_full` times, later and later. Every failure is raised as one of
    `modelfleet.runtime.errors`.
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
        self._channels = {
            service: open_channel(target, max_message_bytes=max_message_bytes)
            for service, target in self._targets.items()
        }
        self._callables: dict[Method[Any], grpc.UnaryUnaryMultiCallable[Any, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Calls under way fail."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    embed = _blocking(inference_calls.embed)
    classify = _blocking(inference_calls.classify)
    extract_entities = _blocking(inference_calls.extract_entities)
    rerank = _blocking(inference_calls.rerank)
    infer = _blocking(inference_calls.infer)
    generate = _streaming(generation_calls.generate)
    served_models = _blocking(served_model_calls.served_models)
    wait_until_served = _blocking(served_model_calls.wait_until_served)
    tokenize = _blocking(tokenizer_calls.tokenize)
    detokenize = _blocking(tokenizer_calls.detokenize)
    models = _blocking(manager_calls.models)
    get_model = _blocking(manager_calls.get_model)
    model_versions = _blocking(manager_calls.model_versions)
    get_model_version = _blocking(manager_calls.get_model_version)
    push = _blocking(manager_calls.push)
    set_alias = _blocking(manager_calls.set_alias)
    place_model = _blocking(manager_calls.place_model)
    delete_alias = _blocking(manager_calls.delete_alias)
    delete_model_version = _blocking(manager_calls.delete_model_version)
    pools = _blocking(pool_calls.pools)
    get_pool = _blocking(pool_calls.get_pool)
    scale_pool = _blocking(pool_calls.scale_pool)
    start_rollout = _blocking(rollout_calls.start_rollout)
    get_rollout = _blocking(rollout_calls.get_rollout)
    rollouts = _blocking(rollout_calls.rollouts)
    promote_rollout = _blocking(rollout_calls.promote_rollout)
    abort_rollout = _blocking(rollout_calls.abort_rollout)
    collect_garbage = _blocking(storage_calls.collect_garbage)
    check_blobs = _blocking(storage_calls.check_blobs)

    def _run(self, procedure: Procedure[R], ended: threading.Event | None = None) -> R:
        """Perform the steps of a procedure; of one that is a part, only until the whole has `ended`."""
        ended = ended or threading.Event()
        try:
            step = next(procedure)
            while not ended.is_set():
                try:
                    outcome = self._perform(step, ended)
                except ModelfleetError as error:
                    step = procedure.throw(error)
                else:
                    step = procedure.send(outcome)
        except StopIteration as done:
            result: R = done.value
            return result
        raise InternalError("Nobody waits for this part any more: another one failed.")

    def _perform(self, step: Step, ended: threading.Event) -> object:
        match step:
            case Ask():
                return self._ask(step)
            case All():
                return self._run_all(step.procedures)
            case Upload():
                return self._upload(step)
            case Pause():
                ended.wait(step.seconds)
                return None
            case TriesWhenFull():
                return self._tries_when_full

    def _seconds(self, timeout_s: float | None) -> float | None:
        """Return how long a call may take. Raises StateConflictError for a client that was closed."""
        if self._closed:
            raise StateConflictError("This client is closed. Make another one, or close it later.")
        return bounded(self._timeout_s if timeout_s is None else timeout_s)

    def _ask(self, call: Ask) -> object:
        try:
            return self._callable(call.method)(
                call.request,
                timeout=self._seconds(call.timeout_s),
                wait_for_ready=call.wait_for_ready,
                metadata=call.metadata,
            )
        except grpc.RpcError as error:
            raise from_call(error, call.method.service, self._targets[call.method.service]) from error

    def _run_all(self, procedures: Iterable[Procedure[Any]]) -> list[object]:
        threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="modelfleet-part")
        ended = threading.Event()
        try:
            parts = [threads.submit(self._run, procedure, ended) for procedure in procedures]
            wait(parts, return_when=FIRST_EXCEPTION)
            failed = [part for part in parts if part.done() and part.exception()]
            return [part.result() for part in failed or parts]
        finally:
            ended.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _stream(self, stream: Stream) -> Generator[GeneratedChunk, None, None]:
        service = stream.method.service
        send: grpc.UnaryStreamMultiCallable[Any, Any] = self._channels[service].unary_stream(
            stream.method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=stream.method.response.FromString,
        )
        call = send(stream.request, timeout=self._seconds(stream.timeout_s))
        try:
            for message in call:
                yield chunk(message)
        except grpc.RpcError as error:
            raise from_call(error, service, self._targets[service]) from error
        finally:
            call.cancel()

    def _upload(self, step: Upload) -> object:
        channel = self._channels[step.method.service]
        send: grpc.StreamUnaryMultiCallable[Any, Any] = channel.stream_unary(
            step.method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=step.method.response.FromString,
        )
        try:
            response = send(step.messages, timeout=self._seconds(step.timeout_s))
        except grpc.RpcError as error:
            step.messages.check()
            raise from_call(error, step.method.service, self._targets[step.method.service]) from error
        step.messages.check()
        return response

    def _callable(self, method: Method[Any]) -> "grpc.UnaryUnaryMultiCallable[Any, Any]":
        known = self._callables.get(method)
        if known is None:
            known = self._callables[method] = self._channels[method.service].unary_unary(
                method.path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=method.response.FromString,
            )
        return known
