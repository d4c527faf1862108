"""WorkerService: assignments and reports through a real server."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from harness.manager import Manager, connected, push, quick_settings, refused, running_manager
from modelfleet.api.manager.v1 import model_service_pb2 as models_pb
from modelfleet.api.manager.v1 import worker_service_pb2 as pb
from modelfleet.api.manager.v1.version_state_pb2 import VERSION_STATE_FAILED, VERSION_STATE_READY
from modelfleet.client.errors import from_rpc_error
from modelfleet.manager.__main__ import managing
from modelfleet.runtime.errors import Reason
from prometheus_client import REGISTRY


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path) as running:
        yield running


def watch(manager: Manager, worker: str = "worker-1", pool: str = "default") -> grpc.aio.UnaryStreamCall:
    request = pb.WatchAssignmentsRequest(worker=worker, pool=pool) if pool else pb.WatchAssignmentsRequest()
    return manager.workers.WatchAssignments(request)


async def newest(call: grpc.aio.UnaryStreamCall) -> pb.Assignment:
    async with asyncio.timeout(10):
        return (await call.read()).assignment


def routes(assignment: pb.Assignment) -> list[tuple[str, str, list[tuple[int, int]]]]:
    return [
        (route.model, route.alias, [(target.model_version, target.weight) for target in route.targets])
        for route in assignment.routes
    ]


def numbers(assignment: pb.Assignment) -> list[tuple[str, int]]:
    return [(version.model, version.model_version) for version in assignment.model_versions]


async def test_watch_begins_with_the_whole_assignment(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    await push(manager, "pii", {"model.onnx": b"2"}, alias="canary")
    await push(manager, "pii", {"model.onnx": b"3"})
    named = await push(manager, "minilm", {"model.onnx": b"1"}, alias="stable")

    call = watch(manager)
    assignment = await newest(call)
    call.cancel()

    assert numbers(assignment) == [("minilm", 1), ("pii", 1), ("pii", 2)]
    assert routes(assignment) == [
        ("minilm", "stable", [(1, 1)]),
        ("pii", "canary", [(2, 1)]),
        ("pii", "stable", [(1, 1)]),
    ]
    assert assignment.model_versions[0] == named.model_version


async def test_watch_tells_every_kind_of_change_with_a_greater_revision(manager: Manager) -> None:
    call = watch(manager)
    seen = [await newest(call)]

    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    seen.append(await newest(call))
    await push(manager, "pii", {"model.onnx": b"2"})
    await manager.models.SetAlias(models_pb.SetAliasRequest(model="pii", alias="stable", model_version=2))
    seen.append(await newest(call))
    await manager.models.DeleteAlias(models_pb.DeleteAliasRequest(model="pii", alias="stable"))
    seen.append(await newest(call))
    call.cancel()

    assert [numbers(assignment) for assignment in seen] == [[], [("pii", 1)], [("pii", 2)], []]
    revisions = [assignment.revision for assignment in seen]
    assert revisions == sorted(set(revisions))


async def test_a_pool_is_sent_what_it_serves_and_an_onlooker_everything(manager: Manager) -> None:
    await push(manager, "everywhere", {"model.onnx": b"1"}, alias="stable")
    await push(manager, "placed", {"model.onnx": b"1"}, alias="stable")
    pools = {pool: watch(manager, f"worker-{pool}", pool) for pool in ("small", "large", "")}
    for call in pools.values():
        await newest(call)

    placed = await manager.models.PlaceModel(models_pb.PlaceModelRequest(model="placed", pools=["large", "large"]))

    assert list(placed.model.pools) == ["large"]
    sent = {pool: await newest(call) for pool, call in pools.items()}
    both = [("everywhere", 1), ("placed", 1)]
    assert {pool: numbers(assignment) for pool, assignment in sent.items()} == {
        "small": both[:1],
        "large": both,
        "": both,
    }
    assert [model for model, _, _ in routes(sent["small"])] == ["everywhere"]

    await manager.models.PlaceModel(models_pb.PlaceModelRequest(model="placed"))
    assert numbers(await newest(pools["small"])) == both
    for call in pools.values():
        call.cancel()


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ([""], "pools has ''. Give names of 1 to 253"),
        (["p" * 254], "Give names of 1 to 253"),
        ([f"pool-{number}" for number in range(101)], "pools has 101 names. Give at most 100"),
    ],
)
async def test_what_can_be_no_pools_is_refused(manager: Manager, pools: list[str], message: str) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})

    call = manager.models.PlaceModel(models_pb.PlaceModelRequest(model="pii", pools=pools))

    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_a_model_that_is_not_registered_cannot_be_placed(manager: Manager) -> None:
    call = manager.models.PlaceModel(models_pb.PlaceModelRequest(model="pii", pools=["large"]))

    await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, "No model 'pii' is registered")


async def test_an_onlooker_watches_as_workers_do_and_counts_as_none(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")

    call = manager.workers.WatchAssignments(pb.WatchAssignmentsRequest())
    assignment = await newest(call)
    call.cancel()

    assert numbers(assignment) == [("pii", 1)]


async def test_what_changes_no_assignment_is_not_sent(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    call = watch(manager)
    before = await newest(call)

    await push(manager, "pii", {"model.onnx": b"2"})
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    await manager.models.DeleteModelVersion(models_pb.DeleteModelVersionRequest(model="pii", model_version=2))
    await manager.models.SetAlias(models_pb.SetAliasRequest(model="pii", alias="last", model_version=1))
    after = await newest(call)
    call.cancel()

    assert after.revision == before.revision + 1


async def test_all_watchers_end_with_the_same_assignment(manager: Manager) -> None:
    calls = [watch(manager, f"worker-{number}") for number in range(20)]
    for call in calls:
        await newest(call)

    for number in range(10):
        await push(manager, "pii", {"model.onnx": bytes([number])}, alias="stable")

    async def last(call: grpc.aio.UnaryStreamCall) -> pb.Assignment:
        while numbers(assignment := await newest(call)) != [("pii", 10)]:
            pass
        call.cancel()
        return assignment

    assignments = await asyncio.gather(*(last(call) for call in calls))
    assert len({assignment.SerializeToString(deterministic=True) for assignment in assignments}) == 1


async def test_watches_end_at_once_as_unavailable_when_the_manager_drains(tmp_path: Path) -> None:
    async with AsyncExitStack() as clients:
        async with managing(quick_settings(tmp_path)) as server:
            manager = await clients.enter_async_context(connected(f"127.0.0.1:{server.port}", tmp_path))
            call = watch(manager)
            await newest(call)
            started = time.monotonic()
        assert time.monotonic() - started < 1

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = from_rpc_error(caught.value)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error.reason is Reason.DRAINING
    assert error.retry_after_s is not None


async def test_revisions_go_on_after_a_restart(tmp_path: Path) -> None:
    async with running_manager(tmp_path) as manager:
        await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
        call = watch(manager)
        before = await newest(call)
        call.cancel()

    async with running_manager(tmp_path) as manager:
        call = watch(manager)
        again = await newest(call)
        await push(manager, "pii", {"model.onnx": b"2"}, alias="stable")
        after = await newest(call)
        call.cancel()

    assert again == before
    assert after.revision > before.revision


async def test_reports_are_counted_by_pool_and_state(manager: Manager) -> None:
    versions = [
        pb.VersionStatus(model="pii", model_version=1, state=VERSION_STATE_READY),
        pb.VersionStatus(model="pii", model_version=2, state=VERSION_STATE_FAILED, reason="no memory"),
    ]
    for worker in ("worker-1", "worker-2", "worker-2"):
        await manager.workers.ReportStatus(
            pb.ReportStatusRequest(worker=worker, pool="gpu", revision=7, versions=versions)
        )

    assert REGISTRY.get_sample_value("modelfleet_manager_workers", {"pool": "gpu"}) == 2
    for state in ("READY", "FAILED"):
        labels = {"pool": "gpu", "state": state}
        assert REGISTRY.get_sample_value("modelfleet_manager_worker_versions", labels) == 2


@pytest.mark.parametrize("state", [0, -1, 99])
async def test_report_of_no_known_state_is_refused(manager: Manager, state: int) -> None:
    version = pb.VersionStatus(model="pii", model_version=1, state=state)
    call = manager.workers.ReportStatus(pb.ReportStatusRequest(worker="w", pool="p", versions=[version]))
    message = rf"state of pii@1 is {state}. Report one of DOWNLOADING, "
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


@pytest.mark.parametrize(
    ("worker", "pool", "field"), [("", "p", "worker"), ("w", "", "pool"), ("w" * 254, "p", "worker")]
)
async def test_worker_without_a_fit_name_is_refused(manager: Manager, worker: str, pool: str, field: str) -> None:
    for call in (
        manager.workers.ReportStatus(pb.ReportStatusRequest(worker=worker, pool=pool)),
        manager.workers.WatchAssignments(pb.WatchAssignmentsRequest(worker=worker, pool=pool)).read(),
    ):
        message = f"{field} is .* Give a name of 1 to 253"
        await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)
