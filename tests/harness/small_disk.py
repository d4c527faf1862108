"""A disk that is soon full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(parent: Path, *, kib: int) -> Iterator[Path]:
    """Give a directory on a file system of its own until the block ends. Skips the test where none may be mounted."""
    if os.geteuid() != 0:
        pytest.skip("Only root may mount a small file system.")
    disk = parent / "small-disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"No small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        # Lazily: what failed may still have a file open.
        subprocess.run(["umount", "--lazy", disk], check=True)
