"""
What is known of a run, kept beside its output as JSON: while it goes on, where to go on; afterwards, what it did.

State: RUNNING -> SEALING (all rows are staged) -> COMPLETE (the output is in its place).
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import orjson
from modelfleet.runtime.errors import StateConflictError


class RunState(StrEnum):
    """How far a run is."""

    RUNNING = "running"
    SEALING = "sealing"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for. A run can be resumed by the same job only."""

    task: str
    model: str
    input_files: int
    input_bytes: int
    input_digest: str
    columns: dict[str, Any]
    options: dict[str, Any]
    shard: str
    output: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    How far a run is.

    `rows` are rows of the input, of all shards, that need not be looked at again. `done` and `failed` rows are this
    shard's. `output_bytes` and `error_bytes` are the lengths of the staged files; what is behind them is not counted.
    `served` names the version that answers, the same to the end.
    """

    job: Job
    served: str
    state: RunState = RunState.RUNNING
    rows: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    truncated: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    seconds: float = 0.0

    def store(self, path: Path) -> None:
        """Write it, whole or not at all."""
        fresh = path.with_name(f"{path.name}.new")
        with fresh.open("wb") as file:
            file.write(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return the one of a path, or none. Raises StateConflictError when the file is something else."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            stored = orjson.loads(content)
            return cls(**{**stored, "job": Job(**stored["job"]), "state": RunState(stored["state"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StateConflictError(
                f"{path} is not a record of a batch run of this release. Begin anew with --overwrite."
            ) from error

    def moved(self, state: RunState) -> Self:
        """Return it in another state."""
        return replace(self, state=state)


def check_same_job(stored: Job, asked: Job, path: Path) -> None:
    """Raise StateConflictError, naming what differs, unless a run of `stored` can be resumed by `asked`."""
    differing = [field.name for field in fields(Job) if getattr(stored, field.name) != getattr(asked, field.name)]
    if not differing:
        return
    if "input_digest" in differing:
        what = (
            f"another input ({stored.input_files} files of {stored.input_bytes} bytes in all, now {asked.input_files} "
            f"of {asked.input_bytes})"
        )
    else:
        name = differing[0]
        what = f"{name} {getattr(stored, name)!r}, now {getattr(asked, name)!r}"
    raise StateConflictError(
        f"The run to resume, {path}, had {what}. Resume it as it was begun, or begin anew with --overwrite."
    )
