"""Reads a blob straight from an object store, by a URL that the manager signed."""

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_PIECE_BYTES = 1 << 20
_STALL_S = 10.0


async def read_url(url: str, offset: int) -> AsyncGenerator[bytes, None]:
    """
    Yield the bytes behind a URL from `offset` on, at most 1 MiB at a time.

    Raises OSError when they cannot be had, or not all of them.
    """
    response = await asyncio.to_thread(_open, url, offset)
    if response is None:
        return
    try:
        while response.length:
            piece = await asyncio.to_thread(_read, response)
            if not piece:
                raise ConnectionError("The connection ended before the blob did.")
            yield piece
    finally:
        # In a thread: closing waits for a read that a cancelled caller has left behind.
        asyncio.get_running_loop().run_in_executor(None, response.close)


def _open(url: str, offset: int) -> HTTPResponse | None:
    if not url.startswith(("https:", "http:")):
        raise OSError("The URL is none of HTTP.")
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})  # noqa: S310  checked above
    try:
        response: HTTPResponse = urlopen(request, timeout=_STALL_S)  # noqa: S310  checked above
    except HTTPError as error:
        with error:
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # all is here already
                return None
            raise OSError(f"The object store answered {error.code} {error.reason}.") from None
    except HTTPException as error:
        raise OSError(f"The object store answered nonsense: {error!r}.") from error
    # Some stores answer 200 to a range. A server that knows none would begin at the beginning.
    if response.length is None or (offset and not _starts_at(response, offset)):
        response.close()
        raise OSError("The object store tells no length or no range.")
    return response


def _starts_at(response: HTTPResponse, offset: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_PIECE_BYTES)
    except HTTPException as error:
        raise OSError(f"The connection failed: {error!r}.") from error
