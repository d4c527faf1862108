"""Blobs for tests: made, stored and read back."""

import hashlib
from collections.abc import AsyncIterator, Iterable

from modelfleet.manager.blobs import Blobs


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def write(blobs: Blobs, content: bytes) -> str:
    """Store a blob and return its digest."""
    await blobs.write(digest(content), len(content), each([content]))
    return digest(content)


async def whole(blobs: Blobs, sha256: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in blobs.read(sha256, offset)])
