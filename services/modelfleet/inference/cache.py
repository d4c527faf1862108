"""A worker's disk: blobs by digest, bundles as directories of hard links to them, and the last assignment."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from modelfleet.bundle.bundle import Bundle, BundleFile, hash_file
from modelfleet.inference.assignment import Assignment
from modelfleet.runtime.errors import DigestMismatchError, ModelfleetError

_log = structlog.get_logger()

# Yields the bytes of a blob from an offset on.
Download = Callable[[str, int], AsyncIterator[bytes]]


_DROPPED = "dropped-"
# Each may keep a thread waiting for a store that stalls, and requests need the event loop's few threads, too.
_DOWNLOADS_AT_ONCE = 3


class Cache:
    """Files below `root`. Everything is written under another name first: what has its final name is whole."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._bundles = root / "bundles"
        self._engines = root / "engines"
        self._attempts = root / "attempts"
        self._assignment = root / "assignment.json"
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._downloads = asyncio.Semaphore(_DOWNLOADS_AT_ONCE)
        for directory in (self._blobs, self._bundles, self._engines, self._attempts):
            directory.mkdir(parents=True, exist_ok=True)

    async def fetch(self, file: BundleFile, download: Download) -> None:
        """
        Have the blob of a file here. A download that was cut short continues where it stopped.

        Raises DigestMismatchError when the bytes are others than announced; nothing of them is kept.
        """
        # Versions share blobs, and two downloads of one would write into the same file.
        lock = self._fetching.setdefault(file.sha256, asyncio.Lock())
        async with lock:
            if not (self._blobs / file.sha256).exists():
                async with self._downloads:
                    await self._download(file, download)

    async def _download(self, file: BundleFile, download: Download) -> None:
        partial = self._blobs / f"{file.sha256}.partial"
        with partial.open("ab") as output:
            if output.tell() > file.size:  # not the beginning of this blob
                output.seek(output.truncate(0))
            async for piece in download(file.sha256, output.tell()):
                await asyncio.to_thread(output.write, piece)
            output.flush()
            await asyncio.to_thread(os.fsync, output.fileno())
        digest, _ = await asyncio.to_thread(hash_file, partial)
        if digest != file.sha256:
            partial.unlink()
            raise _mismatch(file, digest)
        partial.rename(self._blobs / file.sha256)

    def materialize(self, bundle: Bundle) -> Path:
        """
        Check the blobs of a bundle against their hashes and return a directory that has them under their paths.

        Hard links, since ONNX Runtime refuses external data behind links that lead out of the model's directory.
        """
        for file in bundle.files:
            blob = self._blobs / file.sha256
            digest, _ = hash_file(blob)
            if digest != file.sha256:
                blob.unlink()
                raise _mismatch(file, digest)
        # Always made anew: one made before may hold a link to a blob that has been found corrupt since.
        directory = self._bundles / bundle.digest
        building = self._bundles / f"{bundle.digest}.building"
        shutil.rmtree(building, ignore_errors=True)
        for file in bundle.files:
            path = building / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._blobs / file.sha256, path)
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
        return directory

    def engines(self, bundle: Bundle) -> Path:
        """Return the directory of what TensorRT has built for a bundle, made when missing."""
        directory = self._engines / bundle.digest
        directory.mkdir(exist_ok=True)
        return directory

    @contextmanager
    def attempt(self, bundle: Bundle) -> Iterator[int]:
        """Give how many processes have died in this block, one after another: the system or the graph kills them."""
        note = self._attempts / bundle.digest
        try:
            deaths = int(note.read_text())
        except (OSError, ValueError):
            deaths = 0
        with suppress(OSError):  # such as a full disk: then a death goes unnoticed
            note.write_text(str(deaths + 1))
        try:
            yield deaths
        finally:
            with suppress(OSError):
                note.unlink()

    async def keep_only(self, bundles: Sequence[Bundle]) -> None:
        """Delete the files of all other bundles: each rollout would leave a model behind until the disk is full."""
        blobs = {file.sha256 for bundle in bundles for file in bundle.files}
        digests = {bundle.digest for bundle in bundles}
        of_bundles = (self._bundles, self._engines, self._attempts)
        places = ((self._blobs, blobs), *((place, digests) for place in of_bundles))
        dropped = [
            path for place, kept in places for path in place.iterdir() if path.name.partition(".")[0] not in kept
        ]
        if dropped:
            # Moved at once, before anything else is awaited: nobody may find a file that is about to go.
            together = Path(tempfile.mkdtemp(prefix=_DROPPED, dir=self._root))
            for number, path in enumerate(dropped):
                path.rename(together / str(number))
            _log.info("cache cleared", files=len(dropped))
        for leftover in self._root.glob(f"{_DROPPED}*"):
            await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)

    def save_assignment(self, assignment: Assignment) -> None:
        """Keep an assignment for the next start."""
        written = self._assignment.with_suffix(".written")
        written.write_text(assignment.to_json())
        written.rename(self._assignment)

    def last_assignment(self) -> Assignment | None:
        """Return the assignment that was kept last; None where there is none that can be read."""
        try:
            return Assignment.from_json(self._assignment.read_text())
        except FileNotFoundError:
            return None
        except (ModelfleetError, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("kept assignment is unreadable", path=str(self._assignment), error=str(error))
            return None


def _mismatch(file: BundleFile, digest: str) -> DigestMismatchError:
    return DigestMismatchError(
        f"{file.path!r} has the SHA-256 {digest} and should have {file.sha256}. It was deleted and is fetched anew."
    )
