import asyncio
import time
from pathlib import Path

import grpc
import pytest
from harness import graphs
from harness.blob_manager import BlobManager
from harness.serving import serving
from harness.small_tokenizers import byte_bpe_json, digest_of, wordpiece_json
from harness.tokenizer import running_tokenizer
from harness.worker import running_manager
from harness.worker import running_tokenizer as running_address
from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.api.tokenizer.v1 import tokenizer_pb2 as pb
from modelfleet.api.tokenizer.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from modelfleet.bundle.manifest import Task
from modelfleet.client.channel import open_async_channel
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime.errors import ManagerUnreachableError

WORDPIECE = digest_of(wordpiece_json())
BYTE_BPE = digest_of(byte_bpe_json())
DEADLINE_S = 10


def request(digest: str) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(tokenizer_digest=digest, texts=["the cat"])


async def assert_manager_unreachable(tokenizer: TokenizerServiceStub, digest: str) -> None:
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await tokenizer.Tokenize(request(digest), timeout=DEADLINE_S)
    error = from_rpc_error(raised.value)
    assert time.monotonic() - started < DEADLINE_S
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert type(error) is ManagerUnreachableError
    assert error.retry_after_s
    assert f"Blob {digest} is not here yet, and the manager cannot be reached" in error.message


@pytest.mark.slow
async def test_without_its_manager_it_serves_what_it_has_and_recovers_with_it(tmp_path: Path) -> None:
    manager = BlobManager({WORDPIECE: wordpiece_json(), BYTE_BPE: byte_bpe_json()})
    async with serving(lambda server: add_ModelServiceServicer_to_server(manager, server)) as address:
        port = int(address.rpartition(":")[2])
        async with running_tokenizer(address, tmp_path) as tokenizer:
            await tokenizer.Tokenize(request(WORDPIECE))

    async with running_tokenizer(address, tmp_path) as tokenizer:  # restarted, and the manager is gone
        await tokenizer.Tokenize(request(WORDPIECE), timeout=DEADLINE_S)
        await assert_manager_unreachable(tokenizer, BYTE_BPE)
        await tokenizer.Tokenize(request(WORDPIECE), timeout=DEADLINE_S)

        async with serving(lambda server: add_ModelServiceServicer_to_server(manager, server), port=port):
            await tokenizer.Tokenize(request(BYTE_BPE), timeout=DEADLINE_S)


@pytest.mark.slow
async def test_once_ready_it_holds_what_is_assigned_and_a_manager_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    sample = graphs.text_bundle(graphs.embedder(), Task.EMBED)
    async with running_manager() as (manager, address):
        await manager.assign({"embedder@1": sample}, {"embedder": 1})
        async with running_address(address, tmp_path) as tokenizer:
            manager.contents.clear()

            async with open_async_channel(tokenizer) as channel:  # the first request of all
                await TokenizerServiceStub(channel).Tokenize(request(WORDPIECE), timeout=DEADLINE_S)


@pytest.mark.slow
async def test_what_is_assigned_later_is_held_before_anybody_asks(tmp_path: Path) -> None:
    async with running_manager() as (manager, address), running_address(address, tmp_path):
        await manager.assign(
            {"embedder@1": graphs.text_bundle(graphs.embedder(), Task.EMBED, tokenizer=byte_bpe_json())}, {}
        )

        kept = tmp_path / "tokenizers" / f"{BYTE_BPE}.json"
        async with asyncio.timeout(DEADLINE_S):
            while not kept.exists():  # noqa: ASYNC110  nobody is told
                await asyncio.sleep(0.02)
