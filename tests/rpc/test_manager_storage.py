"""What the manager stores, cared for over gRPC and from the command line."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from harness.manager import Manager, chunks, header, push, refused, running_manager, sha256
from harness.small_disk import small_disk
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1 import storage_service_pb2 as storage_pb
from modelfleet.runtime.errors import Reason
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner, Result

MIB = 1 << 20
OLD, NEW = b"old graph", b"new graph"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep what the manager of this process logs out of what the command writes."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path) as manager:
        yield manager


def blob_path(manager: Manager, content: bytes) -> Path:
    return manager.data_dir / "blobs" / "sha256" / sha256(content)[:2] / sha256(content)


async def command(manager: Manager, *arguments: str) -> Result:
    """Run `modelfleet manager` in a thread, as its client blocks while the manager lives in this one."""
    arguments = ("manager", *arguments, "--manager", manager.address)
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, env={"COLUMNS": "200"})


async def missing(manager: Manager, *contents: bytes) -> list[str]:
    asked = pb.FindMissingBlobsRequest(sha256=[sha256(content) for content in contents])
    return list((await manager.models.FindMissingBlobs(asked)).missing_sha256)


async def download(manager: Manager, content: bytes) -> bytes:
    call = manager.models.DownloadBlob(pb.DownloadBlobRequest(sha256=sha256(content)))
    return b"".join([response.data async for response in call])


async def delete(manager: Manager, model: str, model_version: int) -> None:
    await manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model=model, model_version=model_version))


async def test_garbage_is_told_and_collected_from_the_command_line(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": OLD})
    await push(manager, "pii", {"model.onnx": NEW})
    await delete(manager, "pii", 1)

    spared = await command(manager, "gc")
    told = await command(manager, "gc", "--grace", "0", "--dry-run", "--json")
    there = blob_path(manager, OLD).exists()
    done = await command(manager, "gc", "--grace", "0")

    assert "0 blobs deleted" in spared.output
    assert json.loads(told.stdout) == {
        "dry_run": True,
        "garbage": {"sizes": {sha256(OLD): len(OLD)}, "blob_count": 1, "bytes": len(OLD)},
    }
    assert there
    assert (done.exit_code, sha256(OLD) in done.output, "1 blobs deleted" in done.output) == (0, True, True)
    assert not blob_path(manager, OLD).exists()
    assert await missing(manager, OLD, NEW) == [sha256(OLD)]


async def test_manager_collects_by_itself_when_it_starts_and_at_intervals(tmp_path: Path) -> None:
    async def gone(manager: Manager, content: bytes) -> None:
        async with asyncio.timeout(10):
            while await asyncio.to_thread(blob_path(manager, content).exists):
                pass

    async with running_manager(tmp_path) as manager:
        for content in (OLD, NEW, b"newest"):
            await push(manager, "pii", {"model.onnx": content})
        await delete(manager, "pii", 1)
    async with running_manager(tmp_path, blob_grace_s=0, gc_interval_s=0.05) as manager:
        await gone(manager, OLD)
        await delete(manager, "pii", 2)
        await gone(manager, NEW)
        assert await download(manager, b"newest") == b"newest"


async def test_check_names_what_is_wrong_and_ends_with_exit_code_1_until_the_bundle_is_pushed_again(
    manager: Manager,
) -> None:
    for content in (OLD, NEW):
        await push(manager, "pii", {"model.onnx": content})
    sound = await command(manager, "check", "--json")
    blob_path(manager, OLD).write_bytes(OLD[::-1])
    blob_path(manager, NEW).unlink()

    found = await command(manager, "check")
    repaired = await command(manager, "check", "--repair", "--json")
    for content in (OLD, NEW):
        assert not (await push(manager, "pii", {"model.onnx": content})).created
    healed = await command(manager, "check")

    assert (sound.exit_code, json.loads(sound.stdout)["problems"], healed.exit_code) == (0, [], 0)
    assert found.exit_code == repaired.exit_code == 1
    for word in (sha256(OLD), "CORRUPT", "pii@1", sha256(NEW), "MISSING", "pii@2"):
        assert word in found.output
    assert {one["sha256"]: one["repaired"] for one in json.loads(repaired.stdout)["problems"]} == {
        sha256(OLD): True,
        sha256(NEW): False,
    }
    assert await download(manager, OLD) == OLD
    assert await download(manager, NEW) == NEW


async def test_blob_that_was_lost_behind_the_managers_back_is_asked_for_by_the_next_push(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": OLD, "weights.bin": NEW})
    blob_path(manager, NEW).unlink()

    await refused(
        manager, download(manager, NEW), grpc.StatusCode.NOT_FOUND, Reason.BLOB_NOT_FOUND, "Push the bundle again"
    )
    parts = [header("other", {"model.onnx": OLD, "weights.bin": NEW})]
    await refused(
        manager,
        manager.models.PushModelVersion(iter(parts)),
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.STATE_CONFLICT,
        "blob of 'weights.bin'",
    )
    assert await missing(manager, OLD, NEW) == [sha256(NEW)]
    await push(manager, "pii", {"model.onnx": OLD, "weights.bin": NEW})

    assert await download(manager, NEW) == NEW


async def test_push_onto_a_full_disk_is_refused_and_keeps_nothing(tmp_path: Path) -> None:
    small, large = os.urandom(1000), os.urandom(6 * MIB)
    with small_disk(tmp_path, kib=4096) as disk:
        async with running_manager(disk) as manager:
            await push(manager, "pii", {"model.onnx": small})
            free = os.statvfs(disk).f_bavail

            parts = [header("pii", {"model.onnx": large}), *chunks(large)]
            await refused(
                manager,
                manager.models.PushModelVersion(iter(parts)),
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.STORAGE_FULL,
                "no room for more blobs",
            )

            assert os.statvfs(disk).f_bavail == free
            assert await missing(manager, small, large) == [sha256(large)]
            assert await download(manager, small) == small
            assert (await push(manager, "pii", {"model.onnx": small + b"."})).created


async def test_bad_requests_are_explained(manager: Manager) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    negative = storage_pb.CollectGarbageRequest(grace_period=Duration(seconds=-5))
    await refused(
        manager, manager.storage.CollectGarbage(negative), invalid, Reason.INVALID_INPUT, r"-5\.0 s\. Give 0 or more"
    )
    strange = storage_pb.CheckBlobsRequest(page_token="zz")
    await refused(manager, manager.storage.CheckBlobs(strange), invalid, Reason.INVALID_INPUT, "page_token 'zz'")
    unknown = pb.GetBlobUrlRequest(sha256="0" * 64)
    await refused(
        manager, manager.models.GetBlobUrl(unknown), grpc.StatusCode.NOT_FOUND, Reason.BLOB_NOT_FOUND, "No blob 0000"
    )
    none = pb.GetBlobUrlRequest(sha256="x")
    await refused(manager, manager.models.GetBlobUrl(none), invalid, Reason.INVALID_INPUT, "64")


async def test_there_is_no_url_to_a_blob_on_the_managers_own_disk(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": OLD})
    assert (await manager.models.GetBlobUrl(pb.GetBlobUrlRequest(sha256=sha256(OLD)))).url == ""
