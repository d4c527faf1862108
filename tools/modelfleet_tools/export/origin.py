"""Where a source is, so that it can be opened again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export.decoders import writes_text
from modelfleet_tools.export.encoders import open_encoder
from modelfleet_tools.export.modules import open_module
from modelfleet_tools.export.source import Source


@dataclass(frozen=True, slots=True)
class Origin:
    """A Hugging Face folder, a GGUF file, or a factory; and what was said of it."""

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

    @property
    def path(self) -> Path:
        """The folder or file."""
        return Path(self.folder or "")

    @property
    def is_decoder(self) -> bool:
        """Whether it writes text, which another builder exports."""
        if self.module or self.task not in (None, Task.GENERATE):
            return False
        try:
            config: object = json.loads((self.path / "config.json").read_bytes())
        except (OSError, ValueError):
            config = {}
        return writes_text(self.path, config.get("architectures") if isinstance(config, dict) else None)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Origin:
        """Return the one that an export wrote down. Raises InvalidBundleError."""
        source = record.get("source")
        if not isinstance(source, dict):
            raise InvalidBundleError("The record of the export names no source. Name it: --source DIR, or --module.")
        return cls(**{**source, "labels": tuple(source.get("labels", ()))})
