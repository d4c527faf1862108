"""What a store answers that refuses: told as what it is, and worth a retry once that is mended."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from harness.s3 import S3
from modelfleet.manager.blob_store import BlobStore
from modelfleet.runtime.errors import StorageUnreachableError

ZEROS = "0" * 64


async def write(store: BlobStore) -> None:
    async with store.writing(ZEROS) as write:
        await write(b"x")


async def read(store: BlobStore) -> None:
    async for _ in store.read(ZEROS, 0):
        pass


async def in_thread(call: Callable[[], object]) -> object:
    return await asyncio.to_thread(call)


OPERATIONS: dict[str, Callable[[BlobStore], Awaitable[object]]] = {
    "write": write,
    "read": read,
    "sizes": lambda store: store.sizes([ZEROS]),
    "stat": lambda store: in_thread(lambda: store.stat(ZEROS)),
    "list": lambda store: in_thread(lambda: list(store.listed("00"))),
    "delete": lambda store: in_thread(lambda: store.delete([ZEROS])),
}


@pytest.fixture
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_refused_credentials_are_told(s3: S3, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "has been changed")
    store = BlobStore(s3.new_bucket().url, retries=1)

    with pytest.raises(StorageUnreachableError, match="refuses it: its credentials are wrong or have expired"):
        await OPERATIONS[operation](store)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["stat", "delete"])
async def test_a_store_that_never_answers_holds_up_no_writing_session_of_the_database(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never reads them
        endpoint = S3(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for variable, value in endpoint.environment.items():
            monkeypatch.setenv(variable, value)

        async with asyncio.timeout(20):
            with pytest.raises(StorageUnreachableError, match="does not answer"):
                await OPERATIONS[operation](BlobStore(endpoint.new_bucket().url))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("operation", ["list", "delete"])  # of a single object, S3 does not tell why it is not there
async def test_a_bucket_that_is_not_there_is_told(operation: str) -> None:
    store = BlobStore("s3://nonesuch/models", retries=1)

    with pytest.raises(StorageUnreachableError, match="there is no such bucket"):
        await OPERATIONS[operation](store)
