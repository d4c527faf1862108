"""A text model of a few hundred bytes whose answers are known: each token has a vector, a text has their mean."""

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

_WORDS = ("[UNK]", "ready", "steady", "go")
_VECTORS = np.array([[0, 0], [1, 0], [0, 1], [3, 2]], dtype=np.float32)

TEXTS = ("ready", "ready steady", "ready steady go go")
ANSWERS = np.array([[1, 0], [0.5, 0.5], [1.75, 1.25]], dtype=np.float32)
"""The vectors of TEXTS, float32 [3, 2]."""


def write_check_model(folder: Path) -> None:
    """Write the model's bundle into an existing folder."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    vectors = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", 2])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["vectors", "input_ids"], ["last_hidden_state"])],
        "check",
        [ids],
        [vectors],
        [numpy_helper.from_array(_VECTORS, "vectors")],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    save(model, folder / "model.onnx")
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(_WORDS)}, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = {
        "task": "embed",
        "model": "model.onnx",
        "tokenizer": "tokenizer.json",
        "max_tokens": 16,
        "vocabulary_size": len(_WORDS),
        "pooling": "mean",
    }
    (folder / "modelfleet.yaml").write_text(json.dumps(manifest))
