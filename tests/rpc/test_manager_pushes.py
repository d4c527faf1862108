"""PushModelVersion: whole, resumed, cut, repeated, concurrent and bad pushes through a real server."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest
from harness.manager import Files, Manager, chunks, header, push, refused, running_manager, sha256
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub
from modelfleet.runtime.errors import Reason

MIB = 1 << 20
GRAPH = b"graph" * 100_000
WEIGHTS = bytes(range(256)) * (3 * MIB // 256)
FILES: Files = {"model.onnx": GRAPH, "model.onnx.data": WEIGHTS}


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path) as running:
        yield running


async def send(manager: Manager, *parts: pb.PushModelVersionRequest) -> pb.PushModelVersionResponse:
    return await manager.models.PushModelVersion(iter(parts))


async def missing(manager: Manager, contents: Iterable[bytes]) -> list[str]:
    request = pb.FindMissingBlobsRequest(sha256=[sha256(content) for content in contents])
    return list((await manager.models.FindMissingBlobs(request)).missing_sha256)


async def until_stored(manager: Manager, content: bytes) -> None:
    async with asyncio.timeout(10):
        while await missing(manager, [content]):
            pass


def stored_files(manager: Manager) -> set[str]:
    return {path.name for path in (manager.data_dir / "blobs").rglob("*") if path.is_file()}


async def models(manager: Manager) -> list[pb.Model]:
    return list((await manager.models.ListModels(pb.ListModelsRequest())).models)


async def test_same_bundle_is_registered_once(manager: Manager) -> None:
    first = await push(manager, "pii", FILES)
    second = await push(manager, "pii", FILES)

    assert first.created
    assert not second.created
    assert second.model_version == first.model_version


async def test_same_bundle_pushed_again_moves_its_alias(manager: Manager) -> None:
    await push(manager, "pii", FILES, alias="stable")
    await push(manager, "pii", {"model.onnx": b"2"}, alias="stable")

    await push(manager, "pii", FILES, alias="stable")

    resolved = await manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii@stable"))
    assert resolved.model_version.model_version == 1


async def test_blobs_are_shared_between_models(manager: Manager) -> None:
    await push(manager, "pii", FILES)

    pushed = await send(manager, header("other", FILES))

    assert pushed.created
    assert stored_files(manager) == {sha256(GRAPH), sha256(WEIGHTS)}


async def test_empty_file_needs_no_chunk(manager: Manager) -> None:
    pushed = await send(manager, header("pii", {"model.onnx": b"1", "added_tokens.txt": b""}), *chunks(b"1"))

    assert pushed.created
    call = manager.models.DownloadBlob(pb.DownloadBlobRequest(sha256=sha256(b"")))
    assert [response async for response in call] == []


async def test_blob_that_is_stored_already_may_be_sent_again(manager: Manager) -> None:
    await push(manager, "pii", FILES)
    pushed = await send(manager, header("other", FILES), *chunks(GRAPH), *chunks(WEIGHTS))
    assert pushed.created


@pytest.mark.parametrize("cut", ["cancelled", "half-closed"])
async def test_push_that_is_cut_keeps_whole_blobs_and_goes_on_with_the_rest(manager: Manager, cut: str) -> None:
    half = list(chunks(WEIGHTS))[:1]
    call = manager.models.PushModelVersion()
    for part in (header("pii", FILES), *chunks(GRAPH), *half):
        await call.write(part)
    await until_stored(manager, GRAPH)

    if cut == "cancelled":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        await call.done_writing()
        await refused(manager, call, grpc.StatusCode.DATA_LOSS, Reason.DIGEST_MISMATCH, "but 1048576 came")

    assert await missing(manager, FILES.values()) == [sha256(WEIGHTS)]
    assert await models(manager) == []
    resumed = await send(manager, header("pii", FILES), *chunks(WEIGHTS))
    assert resumed.created
    assert stored_files(manager) == {sha256(GRAPH), sha256(WEIGHTS)}


async def test_pushes_of_one_model_at_once_get_numbers_of_their_own(manager: Manager) -> None:
    bundles = [{"model.onnx": b"shared", "weights.bin": bytes([number]) * MIB} for number in range(8)]

    pushed = await asyncio.gather(*(push(manager, "pii", bundle, alias="stable") for bundle in bundles))

    assert sorted(response.model_version.model_version for response in pushed) == list(range(1, 9))
    assert all(response.created for response in pushed)
    model = (await manager.models.GetModel(pb.GetModelRequest(model="pii"))).model
    assert model.latest_model_version == 8
    assert len(model.aliases) == 1


async def test_pushes_of_one_bundle_at_once_make_one_version(manager: Manager) -> None:
    pushed = await asyncio.gather(*(push(manager, "pii", FILES) for _ in range(6)))

    assert sorted(response.created for response in pushed) == [False] * 5 + [True]
    assert {response.model_version.model_version for response in pushed} == {1}
    assert stored_files(manager) == {sha256(GRAPH), sha256(WEIGHTS)}


async def test_bytes_with_another_hash_are_data_loss_and_are_not_kept(manager: Manager) -> None:
    lie = chunks(WEIGHTS[::-1], name=sha256(WEIGHTS))
    call = send(manager, header("pii", FILES), *chunks(GRAPH), *lie)

    message = rf"sent as blob {sha256(WEIGHTS)} hash to {sha256(WEIGHTS[::-1])}"
    await refused(manager, call, grpc.StatusCode.DATA_LOSS, Reason.DIGEST_MISMATCH, message)

    assert stored_files(manager) == {sha256(GRAPH)}
    assert await missing(manager, FILES.values()) == [sha256(WEIGHTS)]
    assert await models(manager) == []


async def test_more_bytes_than_announced_are_refused_before_all_have_come(manager: Manager) -> None:
    endless = chunks(WEIGHTS * 20, name=sha256(GRAPH))
    call = send(manager, header("pii", {"model.onnx": GRAPH}), *endless)
    message = f"announced with {len(GRAPH)} bytes, but more came"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)
    assert stored_files(manager) == set()


async def test_missing_blob_is_named_by_its_file(manager: Manager) -> None:
    call = send(manager, header("pii", FILES), *chunks(GRAPH))
    message = rf"blob of 'model.onnx.data', {sha256(WEIGHTS)}, is neither stored nor was it sent"
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)
    assert await models(manager) == []


@pytest.mark.parametrize("path", ["../model.onnx", "a/../../x", "/etc/passwd", "a//b", "./a", "a\\..\\b", "a\nb", ""])
async def test_path_that_leaves_the_bundle_is_refused(manager: Manager, path: str) -> None:
    call = send(manager, header("pii", {"model.onnx": b"1", path: b"2"}), *chunks(b"1"), *chunks(b"2"))
    message = "cannot be a file of a bundle"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_BUNDLE, message)
    assert stored_files(manager) == set()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", "manifest_json: "),
        ("{", "manifest_json: "),
        ('{"task": "paint", "model": "model.onnx"}', "task: .*'embed'"),
        ('{"task": "tensor", "model": "other.onnx"}', "model is 'other.onnx', which is not a file"),
        ('{"task": "embed", "model": "model.onnx", "max_tokens": 8}', "needs a tokenizer"),
    ],
)
async def test_manifest_that_does_not_fit_is_refused(manager: Manager, manifest: str, message: str) -> None:
    call = send(manager, header("pii", {"model.onnx": b"1"}, manifest=manifest), *chunks(b"1"))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_BUNDLE, message)


async def test_digest_in_the_header_that_is_none_is_refused(manager: Manager) -> None:
    push_header = header("pii", {"model.onnx": b"1"})
    push_header.header.files[0].sha256 = "../../manager.db"
    message = "'../../manager.db' is no SHA-256"
    await refused(manager, send(manager, push_header), grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_BUNDLE, message)


async def test_size_that_the_stored_blob_has_not_is_refused(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"12345"})
    push_header = header("other", {"model.onnx": b"12345"})
    push_header.header.files[0].size = 4
    message = "'model.onnx' is announced with 4 bytes, but its blob .* has 5"
    await refused(manager, send(manager, push_header), grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_BUNDLE, message)


async def test_two_sizes_for_one_blob_are_refused(manager: Manager) -> None:
    push_header = header("pii", {"model.onnx": b"12345", "same.onnx": b"12345"})
    push_header.header.files[1].size = 4
    message = "'same.onnx' is announced with 4 bytes, and another file of the same blob .* with 5"
    await refused(manager, send(manager, push_header), grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_BUNDLE, message)


async def test_push_without_header_is_refused(manager: Manager) -> None:
    for parts in ([], list(chunks(GRAPH))):
        call = send(manager, *parts)
        message = "began without its header"
        await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_second_header_is_refused(manager: Manager) -> None:
    call = send(manager, header("pii", FILES), header("pii", FILES))
    message = "after the header is no chunk"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_chunk_of_a_blob_that_is_not_in_the_bundle_is_refused(manager: Manager) -> None:
    call = send(manager, header("pii", FILES), *chunks(b"stray"))
    message = "which is no file of the header"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)
    assert stored_files(manager) == set()


async def test_chunks_of_a_blob_that_do_not_follow_one_another_are_refused(manager: Manager) -> None:
    call = send(manager, header("pii", FILES), *chunks(GRAPH), *chunks(WEIGHTS), *chunks(GRAPH))
    message = "More chunks of blob"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_chunk_of_more_than_a_mebibyte_is_refused(manager: Manager) -> None:
    call = send(manager, header("pii", FILES), *chunks(WEIGHTS, size=MIB + 1))
    message = f"has {MIB + 1} bytes; at most {MIB} are taken"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


@pytest.mark.parametrize(("model", "alias"), [("PII", ""), ("pii", "7")])
async def test_bad_name_is_refused_before_bytes_are_taken(manager: Manager, model: str, alias: str) -> None:
    call = send(manager, header(model, FILES, alias=alias), *chunks(GRAPH))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "cannot name")
    assert stored_files(manager) == set()


@pytest.mark.slow
async def test_a_push_outlives_the_age_of_its_connection(tmp_path: Path) -> None:
    async with running_manager(tmp_path, max_connection_age_s=0.5) as manager:
        async with grpc.aio.insecure_channel(manager.address) as channel:

            async def parts() -> AsyncIterator[pb.PushModelVersionRequest]:
                yield header("m", {"model.onnx": GRAPH})
                await channel.wait_for_state_change(
                    grpc.ChannelConnectivity.READY
                )  # the connection takes no more calls
                for part in chunks(GRAPH):
                    yield part

            pushed = await ModelServiceStub(channel).PushModelVersion(parts(), timeout=20)

        assert pushed.created
