"""
Replicas that come, go and die behind a name, as those of a headless Service do, under the chart's default timings.

Nothing fails for the clients, for workers that ask tokenizers and managers, and for stubs of others, which know nothing
of health, retry nothing and look names up every 30 s at most.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import numpy as np
import pytest
from harness.dns import ClusterDns, running_dns
from harness.headless import HeadlessService, headless_service
from modelfleet.api.inference.v1 import inference_pb2
from modelfleet.api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from modelfleet.client.channel import open_async_channel, open_hop
from modelfleet.inference.manager_client import ManagerClient
from modelfleet.inference.tokenization import TokenizeOptions
from modelfleet.inference.tokenizer_client import TokenizerClient
from modelfleet.runtime.errors import ModelfleetError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

_REST_S = 0.02  # between the calls of a caller
_SHARE_WITHIN_S = 15
_FEWEST_OF_400 = 60  # a quarter would be 100

Call = Callable[[], Awaitable[int]]


class Caller:
    """Calls without a pause, and keeps who answered, what failed, and the longest time without an answer."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.answers: Counter[int] = Counter()
        self.errors: list[str] = []
        self.longest_gap_s = 0.0
        self._answered = asyncio.Condition()

    async def run(self) -> None:
        """Call until cancelled."""
        last = time.monotonic()
        while True:
            try:
                replica = await self._call()
            except (grpc.aio.AioRpcError, ModelfleetError) as error:
                self.errors.append(repr(error))
            else:
                now = time.monotonic()
                self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
                async with self._answered:
                    self.answers[replica] += 1
                    self._answered.notify_all()
            await asyncio.sleep(_REST_S)

    async def heard(self, replicas: set[int]) -> None:
        """Return once each of these replicas has answered."""
        async with self._answered:
            await self._answered.wait_for(lambda: replicas <= self.answers.keys())

    async def next_answers(self, count: int) -> Counter[int]:
        """Return who gave the next answers."""
        before = self.answers.copy()
        async with self._answered:
            await self._answered.wait_for(lambda: self.answers.total() >= before.total() + count)
        return self.answers - before


def embedding(channel: grpc.aio.Channel) -> Call:
    stub = InferenceServiceStub(channel)

    async def call() -> int:
        response = await stub.Embed(inference_pb2.EmbedRequest(model="m", texts=["a"]), timeout=10)
        return int(np.frombuffer(response.vectors, "<f4")[0])

    return call


def tokenizing(channel: grpc.aio.Channel) -> Call:
    client = TokenizerClient(channel)

    async def call() -> int:
        return int((await client.tokenize(TokenizeOptions("digest", 8), ["a"], [], 10)).ids[0])

    return call


def reporting(channel: grpc.aio.Channel) -> Call:
    client = ManagerClient(channel, worker="w", pool="p")

    async def call() -> int:
        await client.report(1, [])
        return 0  # it does not say who answered

    return call


@asynccontextmanager
async def callers(service: HeadlessService) -> AsyncIterator[dict[str, Caller]]:
    """Call a Service in each of the ways until the block ends."""
    others = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as in another process
    async with (
        open_async_channel(service.target) as ours,
        open_hop(service.target, max_message_bytes=4 << 20) as hop,
        grpc.aio.insecure_channel(service.target, options=others) as plain,
    ):
        ways = {
            "client": Caller(embedding(ours)),
            "worker -> tokenizer": Caller(tokenizing(hop)),
            "worker -> manager": Caller(reporting(hop)),
            "stub": Caller(embedding(plain)),
        }
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(way.run()) for way in ways.values()]
            yield ways
            for task in tasks:
                task.cancel()


async def even_shares(way: Caller, everyone: set[int]) -> None:
    """Return once all answer alike; a connection that has just reached its age is missing for some calls."""
    async with asyncio.timeout(_SHARE_WITHIN_S):
        await way.heard(everyone)
        fewest = 0
        while fewest < _FEWEST_OF_400:
            shares = await way.next_answers(400)
            fewest = min(shares[replica] for replica in everyone)


async def live(dns: ClusterDns, replicas: int) -> dict[str, Caller]:
    """Restart, scale up, scale down and kill replicas under load; return what callers saw of the last, the kill."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(headless_service(dns, f"of-{replicas}.svc", replicas))
        await service.scale(replicas)
        ways = await stack.enter_async_context(callers(service))
        await service.restart()

        await service.scale(4)
        everyone = {int(address.rpartition(".")[2]) for address in service.ready}
        await asyncio.gather(*(even_shares(ways[way], everyone) for way in ("client", "worker -> tokenizer")))

        await service.scale(replicas)
        await service.ended()
        assert [error for way in ways.values() for error in way.errors] == []

        for way in ways.values():
            way.longest_gap_s = 0
        await service.kill()
        await asyncio.gather(*(way.next_answers(100) for way in ways.values()))
        return ways


async def test_no_call_fails_while_replicas_are_restarted_added_removed_and_one_of_two_killed(
    record_property: Callable[[str, object], None],
) -> None:
    with running_dns() as dns:
        single, double = await asyncio.gather(live(dns, 1), live(dns, 2))

    ours = ("client", "worker -> tokenizer", "worker -> manager")
    assert [error for way in ours for error in double[way].errors] == []
    # An only replica that is killed is missed until it is back; how much so is in the report (--junit-xml).
    for way in ours:
        record_property(f"killed alone, {way}", (len(single[way].errors), f"{single[way].longest_gap_s:.1f} s"))
