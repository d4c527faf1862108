"""From a source to a bundle, step by step, each step checked and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from modelfleet.bundle.golden import Array
from modelfleet.bundle.infer import TOKENIZER_FILE
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export import parity
from modelfleet_tools.export.bundle_folder import (
    GRAPH_FILE,
    new_folder,
    read_record,
    write_examples,
    write_files,
    write_record,
)
from modelfleet_tools.export.compression import copied, narrow, optimize, prune
from modelfleet_tools.export.drift import drift
from modelfleet_tools.export.encoders import open_encoder
from modelfleet_tools.export.graph import Exported, Graph, write_graph
from modelfleet_tools.export.modules import open_module
from modelfleet_tools.export.parity import Parity, Progress
from modelfleet_tools.export.quality import Labelled, check_labels
from modelfleet_tools.export.report import Form, Step, measure
from modelfleet_tools.export.source import Inputs, Source
from modelfleet_tools.export.text_rows import TextRows
from modelfleet_tools.export.widths import MAX_DRIFT, Width
from modelfleet_tools.labelled_texts import LabelledTexts

_ROWS = 16
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source is found again: a Hugging Face folder, or a factory; and what was said of it."""

    folder: str | None = None
    module: str | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None

    def open(self) -> Source:
        """Read the source. Raises InvalidBundleError, InvalidInputError."""
        if self.module:
            return open_module(self.module, license_name=self.license)
        task = Task(self.task) if self.task else None
        return open_encoder(Path(self.folder or ""), task=task, labels=self.labels, license_name=self.license)


@dataclass(frozen=True, slots=True)
class Compression:
    """What makes a graph smaller or faster. Without a `max_drift`, that of the precision holds, and none if pruned."""

    precision: Width = Width.FP32
    optimize: bool = False
    prune: float = 0.0
    max_drift: float | None = None

    @property
    def limit(self) -> float:
        """The largest drift that passes."""
        if self.max_drift is not None:
            return self.max_drift
        return math.inf if self.prune else MAX_DRIFT[self.precision]


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, and what each step of it costs and gives."""

    folder: str
    task: str
    license: str | None
    exported: Exported
    parity: Parity
    pruned: str | None
    steps: tuple[Step, ...]


def export(
    origin: Origin,
    out: Path,
    compression: Compression = Compression(),
    *,
    data: LabelledTexts | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """
    Write the bundle of a source to the folder `out`.

    Raises StateConflictError when `out` exists, InvalidBundleError when the source cannot be exported, when its graph
    differs from it, or when an answer drifts past the limit; nothing is left at `out` then.
    """
    with new_folder(out, overwrite=overwrite) as folder:
        tell("Reading the source …")
        source = origin.open()
        manifest = source.checked_manifest()
        labelled = _labelled(source, manifest, data) if data else None
        write_files(source, folder)
        path = folder / GRAPH_FILE
        tell("Exporting …")
        exported, found = _write(source, manifest, path)
        forms = [Form("source", source.run, source.parameters()), _form("fp32", path)]
        pruned = None
        if compression.prune:
            tell("Pruning …")
            smaller = copied(source)
            pruned = prune(smaller, compression.prune)
            exported, found = _write(smaller, manifest, path)
            forms.append(_form("pruned", path))
        if compression.optimize:
            optimize(path)
            forms.append(_form("optimized", path))
        if compression.precision is not Width.FP32:
            tell(f"Converting to {compression.precision} …")
            narrow(path, compression.precision)
            forms.append(_form(compression.precision.value, path))
        tell("Measuring …")
        steps = measure(forms, manifest, [source.inputs], labelled)
        _check_drift(steps[-1], compression)
        write_examples(Graph(path), _singles(source), folder)
        report = Report(str(out), manifest.task.value, manifest.license, exported, found, pruned, tuple(steps))
        write_record(folder, _record(origin, compression, report))
    return report


def verify(folder: Path, origin: Origin | None = None, *, progress: Progress | None = None) -> tuple[Parity, float]:
    """
    Compare a bundle with its source, which its record names unless `origin` does. Returns parity and drift.

    Real inputs, and random ones of every length from 1 to the largest. A graph of fp32 may differ by no more than sums
    in another order; of others the drift of answers is limited as it was when they were exported. Raises
    InvalidBundleError when the graph is past that.
    """
    record: Mapping[str, Any] = {} if origin else read_record(folder)
    source = (origin or _origin(record)).open()
    settings: Mapping[str, Any] = record.get("compression", {})
    if settings.get("prune"):
        prune(source, settings["prune"])
    graph = Graph(folder / GRAPH_FILE)
    found = parity.compare(graph, source, every=True, progress=progress)
    far = max(0.0, drift(source.checked_manifest(), source.inputs, source.run(source.inputs), graph.run(source.inputs)))
    width = Width(settings.get("precision", Width.FP32))
    if width is Width.FP32:
        parity.check(found)
    limit = settings.get("max_drift")
    limit = MAX_DRIFT[width] if limit is None else limit
    if far > limit:
        raise InvalidBundleError(
            f"Answers of {folder} are off those of its source by {far:.3g}; {limit:g} is allowed. Export it again.",
            field="model",
        )
    return found, far


def _write(source: Source, manifest: Manifest, path: Path) -> tuple[Exported, Parity]:
    found: list[Parity] = []

    def check(graph: Graph) -> None:
        found.append(parity.compare(graph, source, every=False))
        parity.check(found[-1])
        _check_padding(source, manifest, graph)

    exported = write_graph(source, path, check)
    return exported, found[-1]


def _check_padding(source: Source, manifest: Manifest, graph: Graph) -> None:
    """Raise InvalidBundleError unless a text's answer is the same alone and beside longer ones."""
    if manifest.task is Task.TENSOR:
        return
    together = graph.run(source.inputs)
    for index, (_, inputs) in enumerate(_singles(source)):
        alone = graph.run(inputs)
        beside = {name: _like(together[name][index : index + 1], array) for name, array in alone.items()}
        if (far := drift(manifest, inputs, alone, beside)) > parity.FP32_TOLERANCE:
            raise InvalidBundleError(
                f"A text's answer changes by {far:.3g} when it is padded beside longer ones. Let the module take "
                "attention_mask and leave padding out.",
                field="model",
            )


def _like(array: Array, other: Array) -> Array:
    return array[tuple(slice(size) for size in other.shape)]


def _singles(source: Source) -> list[tuple[str, Inputs]]:
    """Return each of the source's inputs as a batch of one, texts without their padding."""
    mask = source.inputs.get("attention_mask")
    rows = min(_ROWS, *(len(array) for array in source.inputs.values()))
    singles: list[tuple[str, Inputs]] = []
    for index in range(rows):
        length = None if mask is None else int(mask[index].sum())
        row = {
            name: np.ascontiguousarray(array[index : index + 1, :length] if length else array[index : index + 1])
            for name, array in source.inputs.items()
        }
        singles.append((f"input {index}", row))
    return singles


def _labelled(source: Source, manifest: Manifest, data: LabelledTexts) -> Labelled:
    check_labels(data.labels, manifest)
    content = source.files[TOKENIZER_FILE]
    rows = TextRows(content if isinstance(content, bytes) else content.read_bytes(), manifest, tuple(source.inputs))
    return Labelled(
        [rows.batch(data.texts[first : first + _ROWS]) for first in range(0, len(data), _ROWS)], data.labels
    )


def _form(name: str, path: Path) -> Form:
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Form(name, Graph(path).run, size)


def _check_drift(step: Step, compression: Compression) -> None:
    if not step.drift <= compression.limit:
        raise InvalidBundleError(
            f"Answers of the {step.name} graph drift by {step.drift:.3g} from the source's; {compression.limit:g} is "
            "allowed. Choose a wider --precision, prune less, or allow more with --max-drift.",
            field="model",
        )


def _record(origin: Origin, compression: Compression, report: Report) -> dict[str, object]:
    if origin.folder:
        origin = Origin(**{**asdict(origin), "folder": str(Path(origin.folder).resolve())})
    limit = None if math.isinf(compression.limit) else compression.limit
    return {
        "source": asdict(origin),
        "compression": {**asdict(compression), "max_drift": limit},
        "versions": {name: version(name) for name in _PACKAGES},
        "report": {key: value for key, value in asdict(report).items() if key != "folder"},
    }


def _origin(record: Mapping[str, Any]) -> Origin:
    source = record.get("source")
    if not isinstance(source, dict):
        raise InvalidBundleError("The record of the export names no source. Name it: --source DIR, or --module.")
    return Origin(**{**source, "labels": tuple(source.get("labels", ()))})
