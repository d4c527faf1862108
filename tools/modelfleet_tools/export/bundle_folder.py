"""Where an export goes: a new folder that appears when it is whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import GoldenExample, write_golden
from modelfleet.bundle.manifest import MANIFEST_FILE, Manifest
from modelfleet.runtime.errors import StateConflictError

from modelfleet_tools.export.source import Inputs, Source

if TYPE_CHECKING:
    from modelfleet_tools.export.graph import Graph  # imports ONNX Runtime, which commands do without

GRAPH_FILE = "model.onnx"
_GOLDEN = 4
# What says who made a model, and what may be done with it.
NOTICES = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """
    Give an empty folder that takes the name `out` at the end, and is gone when anything is raised.

    Raises StateConflictError when there is something at `out`, unless it shall be overwritten.
    """
    if out.exists() and not overwrite:
        raise StateConflictError(f"{out} exists. Give another --out, or --overwrite it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            fresh = Path(temporary) / "bundle"
            fresh.mkdir()
            yield fresh
            if out.exists():
                out.replace(Path(temporary) / "old")
            fresh.replace(out)
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise StateConflictError(f"{out} cannot be written: {what}.") from error


def notices(folder: Path) -> list[Path]:
    """Return the model card and the licences of a folder."""
    return [path for pattern in NOTICES for path in sorted(folder.glob(pattern)) if path.is_file()]


def write_files(source: Source, folder: Path) -> None:
    """Put everything but the graph into the folder: the manifest and the files beside it."""
    for name, content in source.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
    write_manifest(source.checked_manifest(), folder)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `modelfleet.yaml`, without what is a default."""
    (folder / MANIFEST_FILE).write_text(
        yaml.safe_dump(json.loads(manifest.to_json()), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def write_examples(graph: Graph, rows: Sequence[tuple[str, Inputs]], folder: Path) -> None:
    """Record the graph's outputs for the first rows as golden examples, and check the bundle as a whole."""
    write_golden(
        folder / GOLDEN_FILE,
        [GoldenExample(name, inputs, graph.run(inputs)) for name, inputs in rows[:_GOLDEN]],
    )
    open_directory(folder)
