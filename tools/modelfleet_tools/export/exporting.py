"""From a source to a bundle, step by step, each step checked and measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import Array
from modelfleet.bundle.infer import TOKENIZER_FILE
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export import decoder_exporting, parity
from modelfleet_tools.export.bundle_folder import GRAPH_FILE, new_folder, write_examples, write_files
from modelfleet_tools.export.compression import Compression, copied, narrow, optimize, prune
from modelfleet_tools.export.drift import drift
from modelfleet_tools.export.graph import Exported, Graph, write_graph
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.parity import Parity, Progress
from modelfleet_tools.export.quality import Labelled, check_labels
from modelfleet_tools.export.record import RECORD_FILE, compression_of, read_record, write_record
from modelfleet_tools.export.report import Form, Report, measure
from modelfleet_tools.export.source import Inputs, Source
from modelfleet_tools.export.text_rows import TextRows
from modelfleet_tools.export.widths import Width
from modelfleet_tools.labelled_texts import LabelledTexts

_ROWS = 16
_AS_IT_IS = Compression()


def export(
    origin: Origin,
    out: Path,
    compression: Compression = _AS_IT_IS,
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
    if origin.is_decoder:
        return decoder_exporting.export(origin, out, compression, data=data, overwrite=overwrite, tell=tell)
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
        compression.check(steps[-1])
        write_examples(Graph(path), _singles(source), folder)
        report = Report(str(out), manifest.task.value, manifest.license, exported, found, pruned, tuple(steps))
        write_record(folder, origin, compression, compression.limit(), report)
    return report


def verify(folder: Path, origin: Origin | None = None, *, progress: Progress | None = None) -> tuple[Parity, float]:
    """
    Compare a bundle with its source, which its record names unless `origin` does. Returns parity and drift.

    Real inputs, and random ones of every length from 1 to the largest. A graph of fp32 may differ by no more than sums
    in another order; of others the drift of answers is limited as it was when they were exported. Raises
    InvalidBundleError when the graph is past that.
    """
    # Where it was made here, its record says how, also when its source is named.
    record = {} if origin and not (folder / RECORD_FILE).exists() else read_record(folder)
    origin = origin or Origin.of_record(record)
    compression = compression_of(record)
    if origin.is_decoder:
        return decoder_exporting.verify(folder, origin, compression)
    source = origin.open()
    if compression.prune:
        prune(source, compression.prune)
    graph = Graph(folder / open_directory(folder)[0].manifest.model)
    found = parity.compare(graph, source, every=True, progress=progress)
    far = max(0.0, drift(source.checked_manifest(), source.inputs, source.run(source.inputs), graph.run(source.inputs)))
    if compression.precision is Width.FP32:
        parity.check(found)
    compression.check_again(folder, far)
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
