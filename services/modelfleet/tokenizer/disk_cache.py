"""Files by digest on local disk: a tokenizer service that restarts without its manager still works."""

import hashlib
import tempfile
from pathlib import Path

import structlog

from modelfleet.runtime.errors import DigestMismatchError

_log = structlog.get_logger()


class DiskCache:
    """At most `limit` files in `directory`, those used last. A disk that fails costs a download, never a request."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit

    def read(self, digest: str) -> bytes | None:
        """Return the content, or None where it is not there, cannot be read or was damaged."""
        path = self._path(digest)
        try:
            content = path.read_bytes()
            check_content(digest, content)
            path.touch()
        except FileNotFoundError:
            return None
        except (OSError, DigestMismatchError) as error:
            _log.warning("cached file cannot be used", path=str(path), error=str(error))
            return None
        return content

    def write(self, digest: str, content: bytes) -> None:
        """Keep the content, whole or not at all, and drop the files used longest ago."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".partial", delete=False) as file:
                file.write(content)
            Path(file.name).replace(self._path(digest))
            self._prune()
        except OSError as error:
            _log.warning("file cannot be cached", directory=str(self._directory), error=str(error))

    def _prune(self) -> None:
        files = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[self._limit :]:
            path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.json"


def check_content(digest: str, content: bytes) -> None:
    """Raise DigestMismatchError unless `digest` is the SHA-256 of `content`."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        raise DigestMismatchError(
            f"The {len(content)} bytes received for blob {digest} have the SHA-256 {actual}. "
            "The store may be damaged: push the model again."
        )
