"""Smaller graphs: narrower numbers by ONNX Runtime's quantizers, fused operators by its optimizer, weights left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export.decoders import DecoderDevice
from modelfleet_tools.export.graph import Graph
from modelfleet_tools.export.quiet import quiet
from modelfleet_tools.export.report import Step
from modelfleet_tools.export.source import Source
from modelfleet_tools.export.widths import MAX_DRIFT, Width

if TYPE_CHECKING:
    import torch

_INT4_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Compression:
    """
    What makes a graph smaller or faster. Without a `max_drift`, that of the precision holds, and none if pruned.

    `device` is what a decoder is built for; other graphs run on any.
    """

    precision: Width = Width.FP32
    optimize: bool = False
    prune: float = 0.0
    max_drift: float | None = None
    device: DecoderDevice = "cpu"

    def limit(self, usual: Mapping[Width, float] = MAX_DRIFT) -> float:
        """Return the largest drift that passes."""
        if self.max_drift is not None:
            return self.max_drift
        return math.inf if self.prune else usual[self.precision]

    def check(self, step: Step, usual: Mapping[Width, float] = MAX_DRIFT) -> None:
        """Raise InvalidBundleError when answers drift further."""
        limit = self.limit(usual)
        if step.drift is not None and not step.drift <= limit:
            raise InvalidBundleError(
                f"Answers of the {step.name} graph drift by {step.drift:.3g} from the source's; {limit:g} is allowed. "
                "Choose a wider --precision, prune less, or allow more with --max-drift.",
                field="model",
            )

    def check_again(self, folder: Path, drift: float, usual: Mapping[Width, float] = MAX_DRIFT) -> None:
        """Raise InvalidBundleError when a bundle drifts further from a source that was pruned as it was."""
        limit = replace(self, prune=0.0).limit(usual)
        if not drift <= limit:
            raise InvalidBundleError(
                f"Answers of {folder} are off those of its source by {drift:.3g}; {limit:g} is allowed. Export it "
                "again.",
                field="model",
            )


def narrow(graph: Path, width: Width) -> None:
    """Rewrite a graph of fp32 with narrower numbers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  takes a second to import

    if width is Width.FP32:
        return
    with quiet():
        if width is Width.INT8:
            # Per channel: one scale for a whole matrix would lose its small rows.
            model = onnx.load(graph)
            # Shapes that the exporter noted of weights are no longer theirs once the quantizer has turned them.
            del model.graph.value_info[:]
            quantize_dynamic(model, graph, per_channel=True, weight_type=QuantType.QInt8)
        elif width is Width.INT4:
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415

            quantizer = MatMulNBitsQuantizer(
                onnx.load(graph), block_size=_INT4_BLOCK, is_symmetric=True, accuracy_level=4
            )
            quantizer.process()
            quantizer.model.save_model_to_file(str(graph), False)
        else:
            from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

            onnx.save(convert_float_to_float16(onnx.load(graph), keep_io_types=True), graph)


def optimize(graph: Path) -> None:
    """
    Fuse operators of transformers by ONNX Runtime's offline optimizer.

    On a CPU a session does nearly all of that itself when it loads a graph. Raises InvalidBundleError when the
    optimizer loses an input.
    """
    from onnxruntime.transformers import optimizer  # noqa: PLC0415  takes a second to import
    from onnxruntime.transformers.fusion_options import FusionOptions  # noqa: PLC0415

    wanted = Graph(graph).inputs
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # its operator takes int32 ids and masks only
    with quiet():
        optimized = optimizer.optimize_model(str(graph), model_type="bert", opt_level=0, optimization_options=options)
        optimized.save_model_to_file(str(graph))
    if Graph(graph).inputs != wanted:
        raise InvalidBundleError(
            f"ONNX Runtime's optimizer lost inputs of the graph: {', '.join(wanted)} became "
            f"{', '.join(Graph(graph).inputs)}. Export without --optimize.",
            field="model",
        )


def prune(source: Source, fraction: float) -> str:
    """
    Leave a fraction of the weights out, those of the smallest magnitude, and return what was done.

    Feed-forward layers of encoders lose whole neurons, which makes them smaller and faster. Of other modules, single
    weights of linear, convolutional and recurrent layers become 0, which a compressed file shows and speed does not.
    """
    import torch  # noqa: PLC0415  torch is needed by exports alone

    pairs = [pair for module in source.module.modules() if (pair := _feed_forward(module))]
    with torch.no_grad():
        for first, second in pairs:
            _drop_neurons(first, second, fraction)
        if pairs:
            left = {first.out_features for first, _ in pairs}
            return f"{fraction:.0%} of the neurons of {len(pairs)} feed-forward layers, {min(left)} are left in each"
        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.LSTM, torch.nn.GRU)
        weights = [
            parameter
            for module in source.module.modules()
            if isinstance(module, layers)
            for name, parameter in module.named_parameters(recurse=False)
            if name.startswith("weight")
        ]
        for weight in weights:
            count = int(weight.numel() * fraction)
            if count:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(count).values] = 0
    return f"{fraction:.0%} of the single weights of {len(weights)} matrices"


def _feed_forward(module: Any) -> tuple[torch.nn.Linear, torch.nn.Linear] | None:
    """Return the layers to and from the hidden neurons: as BERT's relatives name them, or DistilBERT, or ALBERT."""
    if hasattr(module, "intermediate") and hasattr(module, "output") and hasattr(module.output, "dense"):
        inner = getattr(module.intermediate, "dense", None)
        return (inner, module.output.dense) if inner is not None else None
    for first, second in (("lin1", "lin2"), ("ffn", "ffn_output")):
        if hasattr(module, first) and hasattr(module, second) and hasattr(getattr(module, first), "out_features"):
            return getattr(module, first), getattr(module, second)
    return None


def _drop_neurons(first: torch.nn.Linear, second: torch.nn.Linear, fraction: float) -> None:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    keep = max(1, round(first.out_features * (1 - fraction)))
    importance = first.weight.norm(dim=1) * second.weight.norm(dim=0)
    kept = importance.topk(keep).indices.sort().values
    first.weight = torch.nn.Parameter(first.weight[kept].clone())
    second.weight = torch.nn.Parameter(second.weight[:, kept].clone())
    if first.bias is not None:
        first.bias = torch.nn.Parameter(first.bias[kept].clone())
    first.out_features = second.in_features = keep


def copied(source: Source) -> Source:
    """Return the source with a module of its own, to be changed."""
    return replace(source, module=copy.deepcopy(source.module))
