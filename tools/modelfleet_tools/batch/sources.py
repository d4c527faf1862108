"""Where rows come from: files and objects, by path, pattern or URL, and what tells one input from another."""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, cast

from modelfleet.runtime.errors import InvalidInputError
from pyarrow import ArrowException
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from modelfleet_tools.batch.zstd import ZstdError, ZstdFile

# What reading a compressed file raises when its bytes are not whole.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, ZstdError)

_BUFFER_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 20
_PATTERN = re.compile(r"[*?[]")


class Format(StrEnum):
    """How rows are written in a file."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


class Compression(StrEnum):
    """What a file is compressed with."""

    NONE = ""
    GZIP = "gz"
    ZSTD = "zst"


_FORMATS = {".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".csv": Format.CSV, ".parquet": Format.PARQUET}


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file system: of this machine, or of an object store."""

    system: FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return isinstance(self.system, LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows, its size in bytes and when it was last written."""

    location: Location
    format: Format
    compression: Compression
    size: int
    modified_ns: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.location.name

    def open(self) -> tuple[IO[bytes], IO[bytes]]:
        """Return the stream of its content, decompressed, and the one of its bytes, whose position tells progress."""
        file = self.location.system.open_input_file(self.location.path)
        raw = cast("IO[bytes]", io.BufferedReader(file, _BUFFER_BYTES))
        match self.compression:
            case Compression.GZIP:
                return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)), raw
            case Compression.ZSTD:
                return cast("IO[bytes]", io.BufferedReader(ZstdFile(raw), _BUFFER_BYTES)), raw
        return raw, raw


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one input from another: files, bytes, and a digest over names, sizes and samples of the content."""

    files: int
    size: int
    digest: str


def locate(url: str) -> Location:
    """Return the place that a path or a URL (`s3://`, `gs://`, `file://`) names. Raises InvalidInputError."""
    if "://" not in url:
        return Location(LocalFileSystem(), str(Path(url).absolute()))
    try:
        system, path = FileSystem.from_uri(url)
    except (ArrowException, OSError, ValueError) as error:
        raise InvalidInputError(f"{url} cannot be opened: {error}. Use a path, or s3://BUCKET/PATH.") from error
    return Location(system, path)


def find_sources(url: str) -> list[Source]:
    """Return the files that a path, pattern or URL names, by name. Raises InvalidInputError when there are none."""
    location = locate(url)
    try:
        infos = (
            _matching(location) if _PATTERN.search(location.path) else [location.system.get_file_info(location.path)]
        )
    except OSError as error:
        raise InvalidInputError(f"{url} cannot be read: {error}.") from error
    files = sorted((info for info in infos if info.type == FileType.File), key=lambda info: str(info.path))
    if not files:
        raise InvalidInputError(f"{url} names no file. Give a file, or a pattern in quotes such as 'data/*.jsonl.gz'.")
    return [_source(location.system, info) for info in files]


def names(url: str, place: Location) -> bool:
    """Return whether a path, pattern or URL names a place, be there a file or not."""
    location = locate(url)
    return bool(location.system.equals(place.system)) and _fits(location.path, place.path)


def kind_of(name: str) -> tuple[Format, Compression]:
    """Return format and compression by the endings of a name. Raises InvalidInputError for others."""
    stem, compression = name, Compression.NONE
    for one in (Compression.GZIP, Compression.ZSTD):
        if name.endswith(f".{one}"):
            stem, compression = name.removesuffix(f".{one}"), one
    found = _FORMATS.get(Path(stem).suffix.lower())
    if found is None or (found is Format.PARQUET and compression):
        raise InvalidInputError(
            f"{name} is of no known format. Names end in .jsonl, .ndjson or .csv, with .gz or .zst after it if "
            "compressed, or in .parquet."
        )
    return found, compression


def fingerprint(sources: Sequence[Source]) -> Fingerprint:
    """
    Return what tells this input from another.

    A local file's first and last MiB are read, so that a copy of it counts as the same; an object's time of writing
    stands for its content.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.size}\0".encode())
        digest.update(_sampled(source) if source.location.is_local else str(source.modified_ns).encode())
    return Fingerprint(len(sources), sum(source.size for source in sources), digest.hexdigest())


def _matching(location: Location) -> list[FileInfo]:
    plain, _, _ = location.path[: cast("re.Match[str]", _PATTERN.search(location.path)).start()].rpartition("/")
    selector = FileSelector(plain or "/", recursive="/" in location.path[len(plain) + 1 :], allow_not_found=True)
    return [info for info in location.system.get_file_info(selector) if _fits(location.path, info.path)]


def _fits(pattern: str, path: str) -> bool:
    parts, found = pattern.split("/"), path.split("/")
    return path == pattern or (len(found) == len(parts) and all(map(fnmatchcase, found, parts)))


def _source(system: FileSystem, info: FileInfo) -> Source:
    return Source(Location(system, info.path), *kind_of(info.base_name), info.size, info.mtime_ns or 0)


def _sampled(source: Source) -> bytes:
    with source.location.system.open_input_file(source.location.path) as file:
        first = file.read(_SAMPLE_BYTES)
        file.seek(max(source.size - _SAMPLE_BYTES, 0))
        return hashlib.sha256(first + file.read(_SAMPLE_BYTES)).digest()
