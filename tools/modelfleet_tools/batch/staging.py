"""The files of a run, from the first row to the output in its place."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

from modelfleet.runtime.errors import InternalError, StateConflictError
from pyarrow.fs import FileType

from modelfleet_tools.batch.checkpoint import Checkpoint, Job, RunState, check_same_job
from modelfleet_tools.batch.formats import Encoder, JsonLines
from modelfleet_tools.batch.sources import Location

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run's files are: what it makes, and what it needs until then, in a directory of this machine."""

    output: Location
    errors: Location
    checkpoint: Path
    staged_output: Path
    staged_errors: Path

    @classmethod
    def of(cls, output: Location, work_dir: Path | None) -> Self:
        """Return the places of an output; work files are beside it, or in the working directory for objects."""
        if work_dir is None:
            work_dir = Path(output.path).parent if output.is_local else Path()
        return cls(
            output,
            replace(output, path=f"{output.path}.errors.jsonl"),
            work_dir / f"{output.name}.run.json",
            work_dir / f"{output.name}.partial",
            work_dir / f"{output.name}.errors.partial",
        )


class Staging:
    """
    Output and errors that grow chunk by chunk; a chunk counts once the checkpoint says so.

    Whatever a kill left behind the checkpoint's lengths is cut off when the run is resumed.
    """

    def __init__(self, places: Places, encoder: Encoder, checkpoint: Checkpoint) -> None:
        self._places = places
        self._encoder = encoder
        self._errors_encoder = JsonLines()
        self.checkpoint = checkpoint

    def append(
        self, records: list[dict[str, object]], errors: list[dict[str, object]], *, first: bool, after: Checkpoint
    ) -> None:
        """Add a chunk. `after` is the checkpoint with the chunk but for the files' lengths, which are set here."""
        output_bytes = self._extend(
            self._places.staged_output, self.checkpoint.output_bytes, self._encoder.chunk(records, first=first)
        )
        error_bytes = self.checkpoint.error_bytes
        if errors:
            error_bytes = self._extend(
                self._places.staged_errors, error_bytes, self._errors_encoder.chunk(errors, first=first)
            )
        self.save(replace(after, output_bytes=output_bytes, error_bytes=error_bytes))

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint."""
        checkpoint.store(self._places.checkpoint)
        self.checkpoint = checkpoint

    def seal(self) -> None:
        """Put the output and the errors in their places. May be done again after a kill at any moment."""
        self.save(self.checkpoint.moved(RunState.SEALING))
        staged_errors, staged = self._places.staged_errors, self._places.staged_output
        if not self.checkpoint.error_bytes:
            staged_errors.unlink(missing_ok=True)
        elif _cut(staged_errors, self.checkpoint.error_bytes):
            self._publish(staged_errors, self._places.errors)
        if _cut(staged, self.checkpoint.output_bytes):
            self._publish(self._encoder.finish(staged), self._places.output)
            staged.unlink(missing_ok=True)
        self.save(self.checkpoint.moved(RunState.COMPLETE))

    def _extend(self, path: Path, length: int, data: bytes) -> int:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(length)
            file.seek(length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return length + len(data)

    def _publish(self, staged: Path, target: Location) -> None:
        if target.is_local:
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(target.path)
            return
        # An object appears when its upload is complete, and not before.
        with staged.open("rb") as source, target.system.open_output_stream(target.path) as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
        staged.unlink()


@contextmanager
def locked(places: Places) -> Iterator[None]:
    """Hold the run for this process. Raises StateConflictError while another has it."""
    places.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    path = places.checkpoint.with_suffix(".lock")
    with path.open("w") as file:
        _lock(file, places)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def begin(places: Places, job: Job, served: str, *, resume: bool, overwrite: bool) -> Checkpoint:
    """
    Return the checkpoint to go on from.

    Raises StateConflictError when there is an output or an unfinished run and neither flag says what to do with it, and
    when the run to resume was another job's.
    """
    stored = None if overwrite else Checkpoint.load(places.checkpoint)
    if stored and resume:
        check_same_job(stored.job, job, places.checkpoint)
        if stored.state is RunState.COMPLETE and not _exists(places.output):
            stored = None
    elif stored and stored.state is not RunState.COMPLETE:
        raise StateConflictError(
            f"A run that makes {places.output.path} was begun and not finished. Go on with --resume, or begin anew "
            "with --overwrite."
        )
    elif not overwrite and _exists(places.output):
        raise StateConflictError(
            f"{places.output.path} is there already. Replace it with --overwrite, or write to another --output."
        )
    if stored and resume:
        return stored
    _clear(places)
    return Checkpoint(job, served)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what the disk refuses into a sentence."""
    try:
        yield
    except OSError as error:
        what = "The disk is full" if error.errno in _FULL else "The output cannot be written"
        raise InternalError(
            f"{what}: {error.strerror or error} ({error.filename or 'while writing'}). Every chunk before is kept. "
            "Make room, and go on with --resume."
        ) from error


def _cut(path: Path, length: int) -> bool:
    """Take what a kill left behind off a staged file; return whether there is one."""
    if path.exists():
        os.truncate(path, length)
        return True
    return False


def _lock(file: IO[str], places: Places) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateConflictError(
            f"Another process is making {places.output.path}. Wait for it, or write to another --output."
        ) from error


def _exists(location: Location) -> bool:
    return bool(location.system.get_file_info(location.path).type != FileType.NotFound)


def _clear(places: Places) -> None:
    places.checkpoint.unlink(missing_ok=True)
    places.staged_output.unlink(missing_ok=True)
    places.staged_errors.unlink(missing_ok=True)
    if _exists(places.errors):
        places.errors.system.delete_file(places.errors.path)
