import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from modelfleet.client.channel import open_async_channel
from modelfleet.runtime.metrics_server import serve_metrics
from modelfleet.runtime.server import LIVENESS, READINESS, Server
from modelfleet.runtime.settings import ServerSettings

SERVICE = "modelfleet.api.manager.v1.ModelService"
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server that listens and has not been told that it is ready."""
    server = Server(ServerSettings(host="127.0.0.1", drain_delay_s=0, drain_timeout_s=2), [SERVICE])
    await server.start()
    yield server
    await server.drain()


@asynccontextmanager
async def plain_channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_a_server_is_not_serving_until_it_says_so(server: Server, service: str) -> None:
    async with plain_channel(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        before = await health.Check(health_pb2.HealthCheckRequest(service=service))
        await server.set_serving(serving=True)
        after = await health.Check(health_pb2.HealthCheckRequest(service=service))

    assert (before.status, after.status) == (NOT_SERVING, SERVING)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_a_server_listens_on_all_addresses_of_a_pod_that_has_ipv6_alone(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = Server(ServerSettings(host=host, drain_delay_s=0, drain_timeout_s=2), [SERVICE])
    await server.start()
    metrics_port = serve_metrics(host, 0)

    async with grpc.aio.insecure_channel(f"[::1]:{server.port}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=LIVENESS))
    for address in ("::1", "127.0.0.1"):
        with socket.create_connection((address, metrics_port), timeout=5):
            pass

    await server.drain()


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_a_watcher_sees_every_change_to_the_last(server: Server, service: str) -> None:
    async with plain_channel(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
        seen = [(await watch.read()).status]
        for serving in (True, False, True):
            await server.set_serving(serving=serving)
            seen.append((await watch.read()).status)
        await server.drain()
        seen.append((await watch.read()).status)

    assert seen == [NOT_SERVING, SERVING, NOT_SERVING, SERVING, NOT_SERVING]


async def test_a_drain_does_not_wait_for_watchers() -> None:
    server = Server(ServerSettings(host="127.0.0.1", drain_delay_s=0, drain_timeout_s=60), [SERVICE])
    await server.start()
    async with plain_channel(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()

        async with asyncio.timeout(10):
            await server.drain()

        assert await watch.read() is grpc.aio.EOF


async def status(server: Server, service: str) -> int:
    async with plain_channel(server) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_a_server_is_alive_before_it_is_ready_and_while_it_drains() -> None:
    server = Server(ServerSettings(host="127.0.0.1", drain_delay_s=1, drain_timeout_s=2), [SERVICE])
    await server.start()
    assert (await status(server, READINESS), await status(server, LIVENESS)) == (NOT_SERVING, SERVING)
    await server.set_serving(serving=True)
    assert (await status(server, READINESS), await status(server, LIVENESS)) == (SERVING, SERVING)

    draining = asyncio.create_task(server.drain())
    async with plain_channel(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=READINESS))
        while (await watch.read()).status != NOT_SERVING:
            pass

    assert await status(server, LIVENESS) == SERVING
    await draining


async def test_a_server_that_failed_is_neither_ready_nor_alive_ever_again(server: Server) -> None:
    await server.set_serving(serving=True)

    await server.fail()
    await server.set_serving(serving=True)

    assert [await status(server, service) for service in (READINESS, SERVICE, LIVENESS)] == [NOT_SERVING] * 3


async def test_an_unknown_service_is_not_found(server: Server) -> None:
    async with plain_channel(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="unknown"))

    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_our_channels_send_no_calls_to_a_server_that_is_not_ready(server: Server) -> None:
    async with open_async_channel(f"127.0.0.1:{server.port}", attempts=1) as channel:
        call = channel.unary_unary(f"/{SERVICE}/GetModel")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        await server.set_serving(serving=True)
        with pytest.raises(grpc.aio.AioRpcError) as answered:
            await call(b"", wait_for_ready=True, timeout=10)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert answered.value.code() is grpc.StatusCode.UNIMPLEMENTED  # it arrived, where nobody implements it


async def test_reflection_lists_the_services_and_describes_them(server: Server) -> None:
    request = reflection_pb2.ServerReflectionRequest
    async with plain_channel(server) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([request(list_services=""), request(file_containing_symbol=SERVICE)]))
        listed, described = [answer async for answer in call]

    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_a_port_that_is_taken_is_an_error_that_names_it(server: Server) -> None:
    second = Server(ServerSettings(host="127.0.0.1", port=server.port), [])

    with pytest.raises(OSError, match=f"Cannot listen on 127.0.0.1:{server.port}"):
        await second.start()
