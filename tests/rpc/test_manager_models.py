"""ModelService: registry, aliases, lists and downloads through a real server."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from harness.manager import Manager, push, refused, running_manager, sha256
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.runtime.errors import Reason

MIB = 1 << 20


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path) as running:
        yield running


async def download(manager: Manager, digest: str, offset: int = 0) -> list[bytes]:
    call = manager.models.DownloadBlob(pb.DownloadBlobRequest(sha256=digest, offset=offset))
    return [response.data async for response in call]


async def test_pushed_model_is_found_by_every_kind_of_reference(manager: Manager) -> None:
    files = {"model.onnx": b"graph", "data/weights.bin": b"weights"}

    pushed = (await push(manager, "pii", files, alias="stable")).model_version

    assert (pushed.model, pushed.model_version) == ("pii", 1)
    assert [file.path for file in pushed.files] == ["data/weights.bin", "model.onnx"]
    for reference in ("pii", "pii@stable", "pii@1"):
        found = await manager.models.GetModelVersion(pb.GetModelVersionRequest(model=reference))
        assert found.model_version == pushed


async def test_model_tells_its_aliases_newest_version_and_task(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    await push(manager, "pii", {"model.onnx": b"2"}, alias="canary")

    model = (await manager.models.GetModel(pb.GetModelRequest(model="pii"))).model

    assert [(alias.alias, alias.model_version) for alias in model.aliases] == [("canary", 2), ("stable", 1)]
    assert (model.latest_model_version, model.task) == (2, "tensor")


async def test_models_are_listed_in_pages_ordered_by_name(manager: Manager) -> None:
    for name in ("c", "a", "b"):
        await push(manager, name, {"model.onnx": b"same"})

    first = await manager.models.ListModels(pb.ListModelsRequest(page_size=2))
    last = await manager.models.ListModels(pb.ListModelsRequest(page_size=2, page_token=first.next_page_token))

    assert [model.model for model in first.models] == ["a", "b"]
    assert [model.model for model in last.models] == ["c"]
    assert last.next_page_token == ""


async def test_versions_are_listed_in_pages_newest_first(manager: Manager) -> None:
    for content in (b"1", b"2", b"3"):
        await push(manager, "pii", {"model.onnx": content})

    first = await manager.models.ListModelVersions(pb.ListModelVersionsRequest(model="pii", page_size=2))
    last = await manager.models.ListModelVersions(
        pb.ListModelVersionsRequest(model="pii", page_size=2, page_token=first.next_page_token)
    )

    assert [version.model_version for version in first.model_versions] == [3, 2]
    assert [version.model_version for version in last.model_versions] == [1]
    assert last.next_page_token == ""


async def test_alias_moves_and_is_deleted(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    await push(manager, "pii", {"model.onnx": b"2"})

    moved = await manager.models.SetAlias(pb.SetAliasRequest(model="pii", alias="stable", model_version=2))
    resolved = await manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii"))
    await manager.models.DeleteAlias(pb.DeleteAliasRequest(model="pii", alias="stable"))

    assert moved.alias == pb.Alias(alias="stable", model_version=2)
    assert resolved.model_version.model_version == 2
    assert not (await manager.models.GetModel(pb.GetModelRequest(model="pii"))).model.aliases


async def test_number_of_a_deleted_version_is_not_used_again(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})
    await push(manager, "pii", {"model.onnx": b"2"})

    await manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pii", model_version=2))

    assert (await push(manager, "pii", {"model.onnx": b"2"})).model_version.model_version == 3


@pytest.mark.parametrize("offset", [0, 1, MIB - 1, MIB, 3 * MIB // 2, 2 * MIB + 5])
async def test_blob_downloads_from_an_offset_in_pieces_of_at_most_a_mebibyte(manager: Manager, offset: int) -> None:
    content = bytes(range(256)) * (2 * MIB // 256) + b"tail!"
    await push(manager, "pii", {"model.onnx": content})

    pieces = await download(manager, sha256(content), offset)

    assert b"".join(pieces) == content[offset:]
    assert all(len(piece) <= MIB for piece in pieces)


async def test_download_of_an_unknown_blob_is_refused(manager: Manager) -> None:
    call = download(manager, "0" * 64)
    await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.BLOB_NOT_FOUND, "No blob 000")


@pytest.mark.parametrize("digest", ["", "abc", "A" * 64, "../../manager.db"])
async def test_download_by_something_else_than_a_digest_is_refused(manager: Manager, digest: str) -> None:
    call = download(manager, digest)
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "is no SHA-256")


@pytest.mark.parametrize("offset", [-1, 6])
async def test_download_from_outside_the_blob_is_refused(manager: Manager, offset: int) -> None:
    await push(manager, "pii", {"model.onnx": b"12345"})
    call = download(manager, sha256(b"12345"), offset)
    message = rf"offset is {offset}, but blob \w+ has 5 bytes"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_download_of_a_blob_whose_bytes_were_removed_says_so(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"12345"})
    digest = sha256(b"12345")
    (manager.data_dir / "blobs" / "sha256" / digest[:2] / digest).unlink()

    call = download(manager, digest)

    await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.BLOB_NOT_FOUND, "bytes are gone from the store")


async def test_unknown_model_is_refused_and_the_known_ones_are_named(manager: Manager) -> None:
    call = manager.models.GetModel(pb.GetModelRequest(model="pij"))
    await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, "there is none yet")
    await push(manager, "pii", {"model.onnx": b"1"})

    for call in (
        manager.models.GetModel(pb.GetModelRequest(model="pij")),
        manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pij")),
        manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pij@3")),
        manager.models.ListModelVersions(pb.ListModelVersionsRequest(model="pij")),
        manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pij", model_version=1)),
        manager.models.SetAlias(pb.SetAliasRequest(model="pij", alias="stable", model_version=1)),
        manager.models.DeleteAlias(pb.DeleteAliasRequest(model="pij", alias="stable")),
    ):
        message = "No model 'pij' is registered; there is 'pii'"
        await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, message)


async def test_unknown_alias_is_refused_and_the_known_ones_are_named(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="canary")
    for call in (
        manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii")),
        manager.models.DeleteAlias(pb.DeleteAliasRequest(model="pii", alias="stable")),
    ):
        message = "Model 'pii' has no alias 'stable'; it has 'canary'"
        await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.ALIAS_NOT_FOUND, message)


async def test_unknown_version_is_refused_and_the_known_ones_are_named(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})
    await push(manager, "pii", {"model.onnx": b"2"})
    for call in (
        manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii@7")),
        manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pii", model_version=7)),
        manager.models.SetAlias(pb.SetAliasRequest(model="pii", alias="stable", model_version=7)),
    ):
        message = "Model 'pii' has no version 7; it has 2, 1"
        await refused(manager, call, grpc.StatusCode.NOT_FOUND, Reason.MODEL_VERSION_NOT_FOUND, message)


async def test_version_that_an_alias_names_is_not_deleted(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    call = manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pii", model_version=1))
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, "'stable' .* names it")
    await manager.models.GetModelVersion(pb.GetModelVersionRequest(model="pii@1"))


@pytest.mark.parametrize("token", ["nonsense", "=", "é", "bW9kZWxz", "bW9kZWxzCg"])
async def test_bad_page_token_is_refused(manager: Manager, token: str) -> None:
    call = manager.models.ListModels(pb.ListModelsRequest(page_token=token))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "page_token .* is not one")


async def test_page_token_of_another_list_is_refused(manager: Manager) -> None:
    for model in ("a", "b"):
        await push(manager, model, {"model.onnx": b"1"})
    token = (await manager.models.ListModels(pb.ListModelsRequest(page_size=1))).next_page_token
    call = manager.models.ListModelVersions(pb.ListModelVersionsRequest(model="a", page_token=token))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "page_token .* is not one")


async def test_negative_page_size_is_refused(manager: Manager) -> None:
    call = manager.models.ListModels(pb.ListModelsRequest(page_size=-1))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "page_size is -1")


@pytest.mark.parametrize("name", ["", "Pii", "pii/x", "@", "x" * 64])
async def test_what_cannot_name_a_model_is_refused(manager: Manager, name: str) -> None:
    call = manager.models.GetModel(pb.GetModelRequest(model=name))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "cannot name a model")


@pytest.mark.parametrize("alias", ["", "7", "Stable"])
async def test_what_cannot_name_an_alias_is_refused(manager: Manager, alias: str) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})
    call = manager.models.SetAlias(pb.SetAliasRequest(model="pii", alias=alias, model_version=1))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "cannot name an alias")


@pytest.mark.parametrize("number", [0, -1])
async def test_number_that_no_version_can_have_is_refused(manager: Manager, number: int) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})
    for call in (
        manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pii", model_version=number)),
        manager.models.SetAlias(pb.SetAliasRequest(model="pii", alias="stable", model_version=number)),
    ):
        message = f"model_version is {number}"
        await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_question_for_too_many_blobs_is_refused(manager: Manager) -> None:
    call = manager.models.FindMissingBlobs(pb.FindMissingBlobsRequest(sha256=["0" * 64] * 10_001))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "at most 10000")


async def test_missing_blobs_are_told_once_and_in_the_order_of_the_question(manager: Manager) -> None:
    await push(manager, "pii", {"model.onnx": b"1"})
    asked = [f"{number:064x}" for number in range(9_998, 0, -1)] + [sha256(b"1"), f"{7:064x}"]
    answer = await manager.models.FindMissingBlobs(pb.FindMissingBlobsRequest(sha256=asked))
    assert list(answer.missing_sha256) == asked[:-2]
