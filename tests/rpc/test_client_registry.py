"""Pushes, aliases and lists against a real manager."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.bundle_graphs import write_graph
from harness.callers import Caller
from harness.manager import quick_settings, running_manager
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub
from modelfleet.bundle.bundle import BundleFile
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient
from modelfleet.client.channel import open_async_channel
from modelfleet.client.manager_calls import CHUNK_BYTES
from modelfleet.manager.__main__ import managing
from modelfleet.runtime.errors import (
    DigestMismatchError,
    InvalidBundleError,
    ModelNotFoundError,
    StateConflictError,
)


@pytest.fixture(params=[False, True], ids=["threads", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
async def targets(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    async with running_manager(tmp_path / "data") as manager:
        yield {"manager": manager.address}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    write_graph(root / "model.onnx")
    (root / "LICENSE").write_text("free")
    return root


async def test_a_push_makes_a_version_and_moves_the_alias(call: Caller, targets: dict[str, str], folder: Path) -> None:
    bundle, paths = open_directory(folder)

    pushed = await call(targets, "push", bundle, paths, "m", alias="stable")

    version = await call(targets, "get_model_version", "m")
    assert pushed.created
    assert version == pushed.model_version
    assert (version.model, version.model_version, version.bundle_digest) == ("m", 1, bundle.digest)
    assert [file.path for file in version.files] == ["LICENSE", "model.onnx"]
    assert pushed.sent_bytes == bundle.size


async def test_a_push_may_place_the_model_and_it_stays_there_until_it_is_placed_again(
    call: Caller, targets: dict[str, str], folder: Path
) -> None:
    bundle, paths = open_directory(folder)
    await call(targets, "push", bundle, paths, "m", pools=["large", "gpu"])
    await call(targets, "push", bundle, paths, "m", alias="stable")
    (model,) = await call(targets, "models")
    assert model.pools == ("gpu", "large")
    assert await call(targets, "get_model", "m") == model

    placed = await call(targets, "place_model", "m")

    assert placed.pools == ()
    assert await call(targets, "models") == (placed,)


async def test_only_missing_blobs_are_sent(call: Caller, targets: dict[str, str], folder: Path) -> None:
    await call(targets, "push", *open_directory(folder), "m")
    (folder / "LICENSE").write_text("freer")
    counts: list[tuple[int, int]] = []

    pushed = await call(
        targets, "push", *open_directory(folder), "m", progress=lambda sent, total: counts.append((sent, total))
    )

    assert (pushed.model_version.model_version, pushed.sent_bytes) == (2, 5)
    assert counts == [(5, 5)]


async def test_the_same_files_again_are_the_same_version(call: Caller, targets: dict[str, str], folder: Path) -> None:
    first = await call(targets, "push", *open_directory(folder), "m")
    again = await call(targets, "push", *open_directory(folder), "m")

    assert (again.created, again.sent_bytes) == (False, 0)
    assert again.model_version == first.model_version


async def test_files_larger_than_a_message_equal_files_and_empty_files_arrive(
    call: Caller, targets: dict[str, str], folder: Path
) -> None:
    content = bytes(range(256)) * (5 * CHUNK_BYTES // 512 + 1)
    for name in ("large.dat", "copy.dat"):
        (folder / name).write_bytes(content)
    (folder / "empty.txt").touch()
    bundle, paths = open_directory(folder)

    pushed = await call(targets, "push", bundle, paths, "m")

    assert [(file.path, file.size) for file in pushed.model_version.files] == [
        (file.path, file.size) for file in bundle.files
    ]
    assert pushed.sent_bytes == bundle.size - len(content)


async def test_a_file_that_changed_since_it_was_read_is_refused_and_nothing_is_registered(
    call: Caller, targets: dict[str, str], folder: Path
) -> None:
    bundle, paths = open_directory(folder)
    (folder / "LICENSE").write_text("else")

    with pytest.raises(DigestMismatchError, match=r"hash to .* the file changes meanwhile"):
        await call(targets, "push", bundle, paths, "m")

    assert await call(targets, "models") == ()


async def test_a_file_that_vanished_is_named(call: Caller, targets: dict[str, str], folder: Path) -> None:
    bundle, paths = open_directory(folder)
    (folder / "LICENSE").unlink()

    with pytest.raises(InvalidBundleError, match="LICENSE cannot be read: No such file"):
        await call(targets, "push", bundle, paths, "m")

    assert await call(targets, "models") == ()


async def test_an_error_of_the_progress_callback_ends_the_push(
    call: Caller, targets: dict[str, str], folder: Path
) -> None:
    def fail(_sent: int, _total: int) -> None:
        raise KeyError("bar")

    with pytest.raises(KeyError, match="bar"):
        await call(targets, "push", *open_directory(folder), "m", progress=fail)


async def test_a_push_goes_on_when_the_manager_was_restarted_midway(tmp_path: Path, folder: Path) -> None:
    (folder / "large.dat").write_bytes(bytes(4 * CHUNK_BYTES))
    bundle, paths = open_directory(folder)
    settings = quick_settings(tmp_path / "data").model_copy(update={"drain_timeout_s": 0})
    loop, midway, restarted = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    totals: list[int] = []

    def wait_midway(_sent: int, total: int) -> None:
        totals.append(total)
        if len(totals) == 2:
            loop.call_soon_threadsafe(midway.set)
            restarted.wait(10)

    async with managing(settings) as server:
        client = AsyncClient(manager=f"127.0.0.1:{server.port}")
        push = asyncio.create_task(client.push(bundle, paths, "m", progress=wait_midway))
        await midway.wait()
        await until_stored(server.port, bundle.files[0])
    async with managing(settings.model_copy(update={"port": server.port})), client:
        restarted.set()
        pushed = await push

    assert pushed.model_version.model_version == 1
    assert totals[-1] < totals[0]


async def until_stored(port: int, file: BundleFile) -> None:
    """Return when the manager has a file whole."""
    async with open_async_channel(f"127.0.0.1:{port}") as channel:
        stub, question = ModelServiceStub(channel), pb.FindMissingBlobsRequest(sha256=[file.sha256])
        while (await stub.FindMissingBlobs(question)).missing_sha256:  # noqa: ASYNC110  it must be asked
            await asyncio.sleep(0.01)


async def test_aliases_are_set_moved_and_deleted(call: Caller, targets: dict[str, str], folder: Path) -> None:
    await call(targets, "push", *open_directory(folder), "m")

    await call(targets, "set_alias", "m", "canary", 1)
    (named,) = await call(targets, "models")
    await call(targets, "delete_alias", "m", "canary")
    (unnamed,) = await call(targets, "models")

    assert (named.aliases, unnamed.aliases) == ({"canary": 1}, {})
    assert (named.model, named.task, named.latest_model_version) == ("m", "tensor", 1)


async def test_a_version_that_an_alias_names_is_not_deleted(
    call: Caller, targets: dict[str, str], folder: Path
) -> None:
    await call(targets, "push", *open_directory(folder), "m", alias="stable")

    with pytest.raises(StateConflictError, match="stable"):
        await call(targets, "delete_model_version", "m", 1)

    await call(targets, "delete_alias", "m", "stable")
    await call(targets, "delete_model_version", "m", 1)
    assert await call(targets, "model_versions", "m") == ()


async def test_lists_are_read_to_their_end(call: Caller, targets: dict[str, str], folder: Path) -> None:
    async with AsyncClient(**targets) as client:
        for number in range(103):  # a page holds 100
            (folder / "LICENSE").write_text(str(number))
            await client.push(*open_directory(folder), "m")

    versions = await call(targets, "model_versions", "m")

    assert [version.model_version for version in versions] == list(range(103, 0, -1))


async def test_an_unknown_model_is_told(call: Caller, targets: dict[str, str]) -> None:
    with pytest.raises(ModelNotFoundError, match="'absent'"):
        await call(targets, "model_versions", "absent")
    with pytest.raises(ModelNotFoundError, match="'absent'"):
        await call(targets, "get_model", "absent")
