"""What is exported: a torch module, what it takes and returns, and what the bundle says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from modelfleet.bundle.golden import Array
from modelfleet.bundle.manifest import Manifest

if TYPE_CHECKING:
    import torch

BATCH = "batch"
MAX_BATCH = 4096

Inputs: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension that may differ between runs: its name, and its least and largest size."""

    name: str
    least: int
    largest: int


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """
    A module to export.

    `module` takes the inputs in their order and returns a tensor, or a sequence of them, one for each of `outputs`.
    `inputs` are real ones, each [batch, …] with at least two elements; their dtypes hold for all runs. `axes` says
    which dimensions vary, by input and dimension; the first one of every input does when it says nothing. `manifest`
    has the fields of modelfleet.yaml; `files` are put beside the graph, by path in the bundle.
    """

    module: torch.nn.Module
    inputs: Inputs
    outputs: Sequence[str] = ("output",)
    axes: Mapping[str, Mapping[int, Axis]] | None = None
    manifest: Mapping[str, object] = field(default_factory=lambda: {"task": "tensor"})
    files: Mapping[str, bytes | Path] = field(default_factory=dict)

    def varying(self, name: str) -> Mapping[int, Axis]:
        """Return the axes of an input, by dimension."""
        batch_only = {0: Axis(BATCH, 1, MAX_BATCH)}
        return batch_only if self.axes is None else self.axes.get(name, {})

    def checked_manifest(self) -> Manifest:
        """Return the manifest that the bundle will have. Raises InvalidBundleError."""
        return Manifest.from_mapping({"model": "model.onnx", **self.manifest}, source="the source's manifest")

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Return what the module gives for a batch, by output name."""
        import torch  # noqa: PLC0415  torch is needed by exports alone

        with torch.inference_mode():
            given: Any = self.module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
        tensors = given if isinstance(given, tuple | list) else (given,)
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, tensors, strict=True)}

    def parameters(self) -> int:
        """Return the bytes of the module's weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())
