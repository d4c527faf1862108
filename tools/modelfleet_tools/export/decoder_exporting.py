"""From a model that writes text to a bundle that onnxruntime-genai serves, held against its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.infer import infer_manifest
from modelfleet.bundle.manifest import Manifest
from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.export import parity
from modelfleet_tools.export.bundle_folder import new_folder, notices, write_manifest
from modelfleet_tools.export.compression import Compression
from modelfleet_tools.export.decoders import GGUF, build, check_width, license_of_gguf, opened
from modelfleet_tools.export.encoders import license_of_card
from modelfleet_tools.export.graph import Exported
from modelfleet_tools.export.next_tokens import compare, prompts, read_built, read_checkpoint, runs_here
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.parity import Parity
from modelfleet_tools.export.record import write_record
from modelfleet_tools.export.report import Report, Step
from modelfleet_tools.export.widths import MAX_TOKEN_DRIFT, Width
from modelfleet_tools.golden_recording import Inputs, record_golden
from modelfleet_tools.labelled_texts import LabelledTexts


def export(
    origin: Origin,
    out: Path,
    compression: Compression,
    *,
    data: LabelledTexts | None,
    overwrite: bool,
    tell: Callable[[str], None],
) -> Report:
    """
    Write the bundle of a decoder to the folder `out`.

    Where it can run on this machine, it is read beside its source, and is not kept when next tokens drift past the
    limit. Raises StateConflictError, InvalidInputError for what decoders have not, InvalidBundleError.
    """
    if data or compression.prune or compression.optimize:
        raise InvalidInputError("A model that writes text takes neither --data nor --prune nor --optimize.")
    check_width(compression.precision, compression.device)
    with new_folder(out, overwrite=overwrite) as folder:
        tell("Reading the source …")
        with opened(origin.path) as checkpoint:
            tell("Building …")
            build(checkpoint, origin.path.name, folder, compression.precision, compression.device)
            manifest = _write_manifest(origin, folder)
            tell("Measuring …")
            steps, found = _measured(checkpoint, origin.path, folder, manifest, compression)
        compression.check(steps[-1], MAX_TOKEN_DRIFT)
        if found and compression.precision is Width.FP32:
            parity.check(found)
        exported = Exported("onnxruntime-genai", _opset(folder / manifest.model), None)
        report = Report(str(out), manifest.task.value, manifest.license, exported, found, None, steps)
        write_record(folder, origin, compression, compression.limit(MAX_TOKEN_DRIFT), report)
        if found:
            tell("Recording golden examples …")
            record_golden(folder, Inputs(), device=compression.device)
        open_directory(folder)
    return report


def verify(folder: Path, origin: Origin, compression: Compression) -> tuple[Parity, float]:
    """Compare a bundle with its source. Raises InvalidBundleError when it is past its limit."""
    if not runs_here(compression.device):
        raise InvalidInputError(f"{folder} runs on {compression.device}, which is not there. Verify it where it is.")
    given = prompts(folder, open_directory(folder)[0].manifest)
    with opened(origin.path) as checkpoint:
        found, far = compare(given, read_checkpoint(checkpoint, given), read_built(folder, given))
    if compression.precision is Width.FP32:
        parity.check(found)
    compression.check_again(folder, far, MAX_TOKEN_DRIFT)
    return found, far


def _write_manifest(origin: Origin, folder: Path) -> Manifest:
    source = origin.path
    for path in notices(source.parent if source.suffix == GGUF else source):
        shutil.copyfile(path, folder / path.name)
    license_name = origin.license or (license_of_gguf(source) if source.suffix == GGUF else license_of_card(source))
    manifest = infer_manifest(folder, {"license": license_name} if license_name else {})
    write_manifest(manifest, folder)
    return manifest


def _measured(
    checkpoint: Path, source: Path, folder: Path, manifest: Manifest, compression: Compression
) -> tuple[tuple[Step, ...], Parity | None]:
    size = source.stat().st_size if source.is_file() else _size(source, "*.safetensors")
    built = _size(folder, f"{manifest.model}*")
    name = compression.precision.value
    if not runs_here(compression.device):
        return (Step("source", size, None, 0.0), Step(name, built, None, None)), None
    given = prompts(folder, manifest)
    before = read_checkpoint(checkpoint, given)
    after = read_built(folder, given)
    found, far = compare(given, before, after)
    return (
        Step("source", size, round(before.tokens_per_s, 1), 0.0),
        Step(name, built, round(after.tokens_per_s, 1), far),
    ), found


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _opset(graph: Path) -> int:
    entries = onnx.load(graph, load_external_data=False).opset_import
    return int(next(entry.version for entry in entries if not entry.domain))
