"""Bundles: the files of one model version, each named by its SHA-256, and one digest for all of them."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from modelfleet.bundle.manifest import Manifest
from modelfleet.runtime.errors import InvalidBundleError, quoted

GOLDEN_FILE = "golden.npz"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 20
_UNSAFE = ("Cc", "Cs")  # control characters, and surrogates, which stand for bytes that are no UTF-8


@dataclass(frozen=True, slots=True, order=True)
class BundleFile:
    """A file of a bundle. `path` is relative with `/`; `sha256` is lower-case hexadecimal; `size` is in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """Files ordered by path, and the manifest. Raises InvalidBundleError when they do not fit together."""

    files: tuple[BundleFile, ...]
    manifest: Manifest
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files)))
        paths = [file.path for file in self.files]
        for file in self.files:
            check_path(file.path)
            check_sha256(file.sha256)
            if file.size < 0:
                raise InvalidBundleError(
                    f"{file.path!r} has the size {file.size}; a size is not negative.", field="files"
                )
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise InvalidBundleError(f"The bundle has {twice!r} twice. Give each file once.", field="files")
        named = {name: getattr(self.manifest, name) for name in ("model", "tokenizer", "chat_template", "adapter")}
        for role, path in named.items():
            if path is not None and path not in paths:
                raise InvalidBundleError(
                    f"The manifest's {role} is {path!r}, which is not a file of the bundle. "
                    f"It has {', '.join(paths) or 'no files'}.",
                    field=role,
                )
        object.__setattr__(self, "digest", _digest(self.files, self.manifest))

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of `tokenizer.json`, by which the tokenizer service knows it."""
        return self._digest_of(self.manifest.tokenizer)

    @property
    def chat_template_digest(self) -> str | None:
        """SHA-256 of the file that holds the chat template, by which the tokenizer service knows it."""
        return self._digest_of(self.manifest.chat_template)

    @property
    def golden(self) -> str | None:
        """Path of the golden examples; None where there are none."""
        return next((file.path for file in self.files if file.path == GOLDEN_FILE), None)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def _digest_of(self, path: str | None) -> str | None:
        return next((file.sha256 for file in self.files if file.path == path), None)


def _digest(files: Iterable[BundleFile], manifest: Manifest) -> str:
    content = {
        "files": [[file.path, file.sha256, file.size] for file in files],
        "manifest": json.loads(manifest.to_json()),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_path(path: str) -> None:
    """Raise InvalidBundleError unless `path` stays inside whatever directory the bundle is written to."""
    parts = PurePosixPath(path).parts
    clean = path == "/".join(parts) and not path.startswith("/") and ".." not in parts and "." not in parts
    if not path or not clean or "\\" in path or any(unicodedata.category(c) in _UNSAFE for c in path):
        raise InvalidBundleError(
            f"{quoted(path)} cannot be a file of a bundle. "
            "Use a relative path with '/', without '.' and '..' parts and control characters.",
            field="files",
        )


def check_sha256(digest: str, *, source: str = "sha256") -> None:
    """Raise InvalidBundleError unless `digest` is 64 lower-case hexadecimal digits."""
    if not _SHA256.fullmatch(digest):
        raise InvalidBundleError(
            f"{quoted(digest)} is no SHA-256. Give 64 lower-case hexadecimal digits.", field=source
        )


def hash_file(path: Path) -> tuple[str, int]:
    """Return the SHA-256 and the size of a file, read in pieces."""
    hasher = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            hasher.update(piece)
            size += len(piece)
    return hasher.hexdigest(), size
