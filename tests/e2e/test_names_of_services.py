"""The only worker and the only tokenizer are replaced under load, as `kubectl rollout restart` does with the chart."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from harness.dns import running_dns
from harness.graphs import embedder, text_bundle
from harness.headless import headless_service
from harness.worker import running_manager
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from modelfleet.bundle.manifest import Task
from modelfleet.client import AsyncClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

_REST_S = 0.02


async def outcomes(call: Callable[[], Awaitable[object]], stopping: asyncio.Event) -> Counter[str]:
    """Call until told to stop; return how the calls ended."""
    found: Counter[str] = Counter()
    while not stopping.is_set():
        try:
            await call()
        except Exception as error:  # noqa: BLE001  whatever it is, it is counted
            found[repr(error)] += 1
        else:
            found["answered"] += 1
        await asyncio.sleep(_REST_S)
    return found


async def test_no_call_fails_while_the_only_worker_and_the_only_tokenizer_are_replaced(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        dns = stack.enter_context(running_dns())
        manager, manager_address = await stack.enter_async_context(running_manager())
        await manager.assign({"embedder@1": text_bundle(embedder(), Task.EMBED)}, {"embedder": 1})

        def tokenizer(address: str) -> Sequence[str]:
            flags = ("--manager", manager_address, "--cache-dir", str(tmp_path / address), "--encoder-threads", "1")
            return ("modelfleet.tokenizer", *flags)

        tokenizers = await stack.enter_async_context(headless_service(dns, "tokenizer.svc", 5, tokenizer))
        await tokenizers.scale(1)

        def worker(address: str) -> Sequence[str]:
            services = ("--manager", manager_address, "--tokenizer", tokenizers.target)
            own = ("--worker", address, "--cache-dir", str(tmp_path / address), "--threads", "1")
            return ("modelfleet.inference", *services, *own)

        workers = await stack.enter_async_context(headless_service(dns, "inference.svc", 6, worker))
        await workers.scale(1)
        client = await stack.enter_async_context(AsyncClient(inference=workers.target, timeout_s=10))
        others = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as in another process
        stub = InferenceServiceStub(
            await stack.enter_async_context(grpc.aio.insecure_channel(workers.target, options=others))
        )
        calls = (
            lambda: client.embed("embedder", ["the cat"]),
            lambda: stub.Embed(pb.EmbedRequest(model="embedder", texts=["the cat"]), timeout=10),
        )

        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(outcomes(call, stopping)) for call in calls]
            await asyncio.gather(tokenizers.restart(), workers.restart())
            await asyncio.gather(tokenizers.ended(), workers.ended())
            stopping.set()

    for caller in callers:
        assert caller.result().keys() == {"answered"}
