import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
from modelfleet.inference import object_reading
from modelfleet.inference.object_reading import read_url


@dataclass
class Store:
    """A server of HTTP that answers whatever it is asked with the same; `url` has a secret in it."""

    url: str
    asked: asyncio.Event
    request: bytes = b""


@asynccontextmanager
async def store(answer: bytes, *, stall: bool = False) -> AsyncIterator[Store]:
    writers: list[asyncio.StreamWriter] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        running.request = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        running.asked.set()
        if not stall:
            writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    running = Store(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x?signature=secret", asyncio.Event())
    async with server:
        yield running
        for writer in writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def whole(url: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in read_url(url, offset)])


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


async def test_bytes_are_read_in_pieces_of_at_most_a_mebibyte() -> None:
    content = bytes(range(256)) * 10_000
    async with store(answer("200 OK", content)) as served:
        pieces = [piece async for piece in read_url(served.url, 0)]
    assert b"".join(pieces) == content
    assert [len(piece) for piece in pieces] == [1 << 20, 1 << 20, len(content) - (2 << 20)]


@pytest.mark.parametrize("status", ["206 Partial Content", "200 OK"])  # some stores do not say that it is a part
async def test_the_rest_is_asked_for_by_range(status: str) -> None:
    async with store(answer(status, b"ent", "Content-Range: bytes 4-6/7")) as served:
        assert await whole(served.url, 4) == b"ent"
    assert b"Range: bytes=4-\r\n" in served.request


async def test_nothing_is_left_to_read_when_all_is_here() -> None:
    async with store(answer("416 Requested Range Not Satisfiable")) as served:
        assert await whole(served.url, 7) == b""


@pytest.mark.parametrize(
    ("answer", "offset", "message"),
    [
        (answer("200 OK", b"content"), 4, "no length or no range"),
        (answer("206 Partial Content", b"tent", "Content-Range: bytes 3-6/7"), 4, "no length or no range"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, "no length or no range"),
        (answer("403 Forbidden", b"<Error/>"), 0, "answered 403 Forbidden"),
        (answer("404 Not Found"), 0, "answered 404 Not Found"),
        (answer("503 Slow Down"), 0, "answered 503 Slow Down"),
        (b"220 ready\r\n", 0, "answered nonsense"),
        (b"", 0, "closed connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nconten", 0, "ended before the blob did"),
    ],
)
async def test_answer_that_is_not_what_was_asked_for_is_an_error_that_tells_no_secret(
    answer: bytes, offset: int, message: str
) -> None:
    async with store(answer) as served:
        with pytest.raises(OSError, match=message) as caught:
            await whole(served.url, offset)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "s3://bucket/blob", "blob", "ftp://127.0.0.1/blob"])
async def test_only_http_is_read(url: str) -> None:
    with pytest.raises(OSError, match="none of HTTP"):
        await whole(url)


async def test_bytes_that_stall_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_reading, "_STALL_S", 0.1)
    async with store(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", stall=True) as served:
        with pytest.raises(TimeoutError):
            await whole(served.url)


async def test_reader_that_is_cancelled_ends_at_once_while_bytes_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_reading, "_STALL_S", 2)
    async with store(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", stall=True) as served:
        reading = asyncio.create_task(whole(served.url))
        async with asyncio.timeout(5):
            await served.asked.wait()
        started = time.monotonic()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert time.monotonic() - started < 1
