"""An ONNX graph of a source: written by torch's exporters, opened with ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort
from modelfleet.bundle.golden import Array
from modelfleet.runtime.errors import InvalidBundleError, ModelfleetError

from modelfleet_tools.export.quiet import first_line, quiet
from modelfleet_tools.export.source import Inputs, Source

if TYPE_CHECKING:
    import torch

OPSET = 20
_TORCHSCRIPT_OPSET = 18
# Larger messages than 2 GiB are not protobuf.
_ONE_FILE_BYTES = 1_900_000_000
_MISSING_OPERATOR = re.compile(
    r"implementation for (?P<kernel>[\w.:]+)|(?P<function>\S+?)(\(-?\d+\))? is not a registered function/op|"
    r"No Op registered for (?P<schema>\w+)"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """How a graph was made: `dynamo` or `torchscript`, the opset, and why the first was not used, if so."""

    exporter: str
    opset: int
    fallback: str | None


def write_graph(source: Source, path: Path, check: Callable[[Graph], object]) -> Exported:
    """
    Write the module's graph: by the dynamo exporter, or where that fails or what it writes is wrong, by TorchScript's.

    `check` runs the graph and raises where it differs from the module. Raises InvalidBundleError with what both say.
    """
    failures = []
    for name, write in (("dynamo", _write_dynamo), ("torchscript", _write_torchscript)):
        path.unlink(missing_ok=True)
        try:
            with quiet():
                write(source, path)
            check(Graph(path))
        except ModelfleetError as error:
            failures.append(f"{name}: {error.message}")
        except Exception as error:  # noqa: BLE001  exporters raise nearly anything
            failures.append(f"{name}: {first_line(error)}")
        else:
            opsets = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}
            return Exported(name, opsets[""], failures[0] if failures else None)
    path.unlink(missing_ok=True)
    raise InvalidBundleError("The module cannot be exported. " + " ".join(failures), field="model")


class Graph:
    """A graph on the CPU. Raises InvalidBundleError that names an operator which ONNX Runtime lacks."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised; ONNX Runtime would also print it
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InvalidBundleError(_refusal(path, error), field="model") from error
        self.inputs: tuple[str, ...] = tuple(node.name for node in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(node.name for node in self._session.get_outputs())

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Return the outputs by name. Raises InvalidBundleError with the shapes that the graph refuses."""
        try:
            arrays = self._session.run(None, {name: inputs[name] for name in self.inputs})
        except Exception as error:
            shapes = {name: list(inputs[name].shape) for name in self.inputs}
            raise InvalidBundleError(
                f"The graph fails on the shapes {shapes}: {first_line(error)}", field="model"
            ) from error
        return dict(zip(self.outputs, arrays, strict=True))


def _write_dynamo(source: Source, path: Path) -> None:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    dims: dict[str, Any] = {}
    shapes = tuple(
        {
            dimension: dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=axis.largest))
            for dimension, axis in source.varying(name).items()
        }
        for name in source.inputs
    )
    torch.onnx.export(
        _positional(source),
        _examples(source),
        str(path),
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        dynamic_shapes=(shapes,),
        opset_version=OPSET,
        external_data=source.parameters() > _ONE_FILE_BYTES,
        dynamo=True,
        verbose=False,
    )


def _write_torchscript(source: Source, path: Path) -> None:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    axes = {name: {dimension: axis.name for dimension, axis in source.varying(name).items()} for name in source.inputs}
    torch.onnx.export(
        _positional(source),
        _examples(source),
        str(path),
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        dynamic_axes=axes | {name: {0: "batch"} for name in source.outputs},
        opset_version=_TORCHSCRIPT_OPSET,
        dynamo=False,
    )


def _examples(source: Source) -> tuple[torch.Tensor, ...]:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    # Copies, each of its own: an exporter takes one tensor that is given twice for one input.
    return tuple(torch.tensor(array) for array in source.inputs.values())


def _positional(source: Source) -> torch.nn.Module:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    class Positional(torch.nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
        """Takes any number of tensors, so that the shapes of all modules are given in one form."""

        def __init__(self) -> None:
            super().__init__()
            self.source = source.module

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.source(*tensors)

    return Positional().eval()


def _refusal(path: Path, error: Exception) -> str:
    said = first_line(error)
    missing = _MISSING_OPERATOR.search(said)
    if missing is None:
        return f"ONNX Runtime refuses {path.name}: {said}"
    operator = next(name for name in missing.group("kernel", "function", "schema") if name)
    return (
        f"ONNX Runtime {ort.__version__} lacks the operator {operator} of {path.name}: {said} Write the module with "
        "operators that it has, or export for another opset."
    )
