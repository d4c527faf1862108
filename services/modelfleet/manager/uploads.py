"""The push of a model version: blobs come in as chunks, each is kept once whole, and then the bundle is registered."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256 as sha256_of

from modelfleet.bundle.bundle import Bundle
from modelfleet.bundle.reference import check_alias_name, check_model_name
from modelfleet.manager.blob_store import PIECE_BYTES
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.placement import check_pools
from modelfleet.manager.registry import Registration, Registry
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, StateConflictError

_EMPTY_SHA256 = sha256_of(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next bytes of a blob, at most 1 MiB."""

    sha256: str
    data: bytes


class Uploads:
    """Takes pushes. A push that is cut leaves the blobs that were whole, and nothing else."""

    def __init__(self, blobs: Blobs, registry: Registry) -> None:
        self._blobs = blobs
        self._registry = registry

    async def push(
        self,
        model: str,
        bundle: Bundle,
        alias: str | None,
        chunks: AsyncIterator[Chunk],
        pools: Sequence[str] = (),
    ) -> Registration:
        """
        Store the blobs of `chunks`, each as consecutive chunks, and register the bundle as `Registry.register` does.

        Raises InvalidInputError, InvalidBundleError, DigestMismatchError and StateConflictError.
        """
        check_model_name(model)
        if alias is not None:
            check_alias_name(alias)
        check_pools(pools)
        sizes = _sizes(bundle)
        if sizes.get(_EMPTY_SHA256) == 0:  # an empty file needs no chunk
            await self._blobs.write(_EMPTY_SHA256, 0, _nothing())
        finished: set[str] = set()
        chunk = await anext(chunks, None)

        async def pieces(sha256: str) -> AsyncGenerator[bytes, None]:
            nonlocal chunk
            while chunk is not None and chunk.sha256 == sha256:
                if len(chunk.data) > PIECE_BYTES:
                    raise InvalidInputError(
                        f"A chunk of blob {sha256} has {len(chunk.data)} bytes; at most {PIECE_BYTES} are taken.",
                        field="chunk.data",
                    )
                yield chunk.data
                chunk = await anext(chunks, None)

        while chunk is not None:
            current = chunk.sha256
            _check_expected(current, sizes, finished)
            async with aclosing(pieces(current)) as blob:
                await self._blobs.write(current, sizes[current], blob)
            finished.add(current)
        await self._check_stored(bundle, sizes)
        return await asyncio.to_thread(self._registry.register, model, bundle, alias, pools)

    async def _check_stored(self, bundle: Bundle, sizes: Mapping[str, int]) -> None:
        if missing := set(await self._blobs.find_lost(sizes)):
            path, sha256 = next((file.path, file.sha256) for file in bundle.files if file.sha256 in missing)
            raise StateConflictError(
                f"The blob of {path!r}, {sha256}, is neither stored nor was it sent. "
                "Ask FindMissingBlobs what to send and push again."
            )


def _sizes(bundle: Bundle) -> Mapping[str, int]:
    sizes: dict[str, int] = {}
    for file in bundle.files:
        if sizes.setdefault(file.sha256, file.size) != file.size:
            raise InvalidBundleError(
                f"{file.path!r} is announced with {file.size} bytes, and another file of the same blob {file.sha256} "
                f"with {sizes[file.sha256]}. Give the size of the file.",
                field="files",
            )
    return sizes


def _check_expected(sha256: str, sizes: Mapping[str, int], finished: set[str]) -> None:
    if sha256 not in sizes:
        raise InvalidInputError(
            f"A chunk is of blob {sha256!r}, which is no file of the header. Send the blobs of the bundle only.",
            field="chunk.sha256",
        )
    if sha256 in finished:
        raise InvalidInputError(
            f"More chunks of blob {sha256} came after those of another. Send all chunks of a blob one after another.",
            field="chunk.sha256",
        )


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield
