"""How a bundle was made, written down beside it, so that it can be compared with its source again."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export.compression import Compression
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.report import Report
from modelfleet_tools.export.widths import Width

RECORD_FILE = "export.json"
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")


def write_record(folder: Path, origin: Origin, compression: Compression, limit: float, report: Report) -> None:
    """Write what was exported, how, by which versions, how much it may drift, and what came of it."""
    if origin.folder:
        origin = replace(origin, folder=str(origin.path.resolve()))
    record = {
        "source": asdict(origin),
        "compression": {**asdict(compression), "max_drift": None if math.isinf(limit) else limit},
        "versions": {name: version(name) for name in _PACKAGES},
        "report": {key: value for key, value in asdict(report).items() if key != "folder"},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> Mapping[str, Any]:
    """Return what was written. Raises InvalidBundleError when the folder was not made by an export."""
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidBundleError(
            f"{folder} has no readable {RECORD_FILE}: it was not made by `modelfleet export`. Name its source: "
            "--source DIR, or --module.",
            field="path",
        ) from error
    if not isinstance(record, dict):
        raise InvalidBundleError(f"{folder / RECORD_FILE} is no JSON object. Export the model again.", field="path")
    return record


def compression_of(record: Mapping[str, Any]) -> Compression:
    """Return how a bundle was made smaller. Raises InvalidBundleError."""
    try:
        stored = dict(record.get("compression", {}))
        return Compression(**{**stored, "precision": Width(stored.get("precision", Width.FP32))})
    except (TypeError, ValueError) as error:
        raise InvalidBundleError(
            f"{RECORD_FILE} cannot be read: {error}. Export the model again.", field="path"
        ) from error
