"""Golden examples for the bundles of `graphs`."""

import hashlib
from pathlib import Path

import numpy as np
from modelfleet.bundle.bundle import GOLDEN_FILE, Bundle, BundleFile
from modelfleet.bundle.golden import GoldenExample, write_golden

from harness.graphs import SampleBundle


def with_golden(sample: SampleBundle, directory: Path, *examples: GoldenExample) -> SampleBundle:
    """Return the bundle with examples; `directory` is for a file on the way."""
    write_golden(directory / GOLDEN_FILE, examples)
    content = (directory / GOLDEN_FILE).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    files = (*sample.bundle.files, BundleFile(GOLDEN_FILE, digest, len(content)))
    return SampleBundle(Bundle(files, sample.bundle.manifest), {**sample.contents, digest: content})


def affine_example(*, off_by: float = 0.0, rows: int = 1) -> GoldenExample:
    """Return an example of `graphs.affine`, wrong by a share of its largest output."""
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    y = 2 * x + 1
    return GoldenExample("first", {"x": x}, {"y": y + np.float32(off_by) * y.max()})
