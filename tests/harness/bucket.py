"""A place for blobs as another program sees it, behind the manager's back."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.store import ObjectStore, from_url


@dataclass(frozen=True)
class Bucket:
    """A directory or a prefix of an object store, by its URL."""

    url: str

    def names(self) -> set[str]:
        """Return all there is, also what is only half written where that can be seen."""
        if self.url.startswith("file:"):
            root = Path(urlsplit(self.url).path)
            return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        return {found["path"] for chunk in obstore.list(self._store) for found in chunk}

    def put(self, sha256: str, content: bytes) -> None:
        """Store bytes under a digest, whatever their own is."""
        obstore.put(self._store, name(sha256), content)

    def delete(self, sha256: str) -> None:
        obstore.delete(self._store, name(sha256))

    @property
    def _store(self) -> ObjectStore:
        if self.url.startswith("file:"):
            return from_url(self.url, mkdir=True)
        return from_url(self.url, client_options={"allow_http": True})


def name(sha256: str) -> str:
    return f"sha256/{sha256[:2]}/{sha256}"
