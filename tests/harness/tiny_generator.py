"""
A generative model that is written down and not trained: it speaks a script.

The token at position p is `script[p % len(script)]`. Where the model `listens`, the index is p + 7 times the token
before, so that each prompt goes its own way. What it says can so be computed by hand. An adapter over it has it say one
token for ever.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from harness.small_tokenizers import byte_bpe_json

VOCABULARY = 300
EOS = 1
CONTEXT = 4096
CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tiny_generator(
    folder: Path, script: Sequence[int], *, listens: bool = False, adapted_to: int | None = None, **manifest: object
) -> Path:
    """Write the bundle's files, `adapted_to` a token with an adapter; `manifest` goes into `modelfleet.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    if adapted_to is not None:
        write_adapter(folder / "lora.onnx_adapter", adapted_to)
        manifest["adapter"] = "lora.onnx_adapter"
    onnx.save(_graph(script, listens=listens), folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(_CONFIG))
    (folder / "tokenizer.json").write_bytes(byte_bpe_json())
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "modelfleet.yaml").write_text(json.dumps({"task": "generate", **manifest}))
    return folder


def write_adapter(path: Path, token: int, *, prefix: str = "lora") -> None:
    """Write what has the graph say a token; `prefix` begins the names of its parameters."""
    scores = np.zeros((1, VOCABULARY), np.float32)
    scores[0, token] = 50
    adapter = ort.AdapterFormat()
    parameters = {f"{prefix}_A": np.ones((1, 1), np.float32), f"{prefix}_B": scores}
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in parameters.items()})
    adapter.export_adapter(str(path))


def spoken(script: Sequence[int], prompt: Sequence[int], count: int, *, listens: bool = False) -> list[int]:
    """Return what the model says after a prompt; it ends before EOS."""
    ids = list(prompt)
    for _ in range(count):
        position = len(ids) - 1
        token = script[(7 * ids[-1] * listens + position) % len(script)]
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


_CONFIG = {
    "model": {
        "bos_token_id": 0,
        "context_length": CONTEXT,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 8,
            "hidden_size": 8,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
        },
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "type": "llama",
        "vocab_size": VOCABULARY,
    },
    "search": {"do_sample": False, "max_length": CONTEXT, "past_present_share_buffer": False, "top_k": 50},
}


def _graph(script: Sequence[int], *, listens: bool) -> onnx.ModelProto:
    table = np.random.default_rng(0).normal(size=(len(script), VOCABULARY)).astype(np.float32)
    table[np.arange(len(script)), list(script)] += 8
    constants = {
        "table": table,
        "length": np.array(len(script), np.int64),
        "weight": np.array(7 * listens, np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis": np.array([1], np.int64),
        "lora_A": np.zeros((1, 1), np.float32),
        "lora_B": np.zeros((1, VOCABULARY), np.float32),
    }
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Gather", ["ids_shape", "one"], ["steps"]),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total"]),
        # A step of one token is at the end of its row; a longer one begins where all rows begin.
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["row_total"], keepdims=1),
        helper.make_node("Sub", ["row_total", "one"], ["last"]),
        helper.make_node("Range", ["zero", "steps", "one"], ["range"]),
        helper.make_node("Sub", ["total", "steps"], ["before"]),
        helper.make_node("Add", ["range", "before"], ["counted"]),
        helper.make_node("Equal", ["steps", "one"], ["single"]),
        helper.make_node("Where", ["single", "last", "counted"], ["position"]),
        helper.make_node("Mul", ["input_ids", "weight"], ["heard"]),
        helper.make_node("Add", ["heard", "position"], ["sum"]),
        helper.make_node("Mod", ["sum", "length"], ["index"]),
        helper.make_node("Gather", ["table", "index"], ["written"]),
        helper.make_node("MatMul", ["lora_A", "lora_B"], ["adapted"]),
        helper.make_node("Add", ["written", "adapted"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "steps_in"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total_in"]),
        # Initializers that are inputs as well: an adapter may replace them.
        helper.make_tensor_value_info("lora_A", TensorProto.FLOAT, [1, "rank"]),
        helper.make_tensor_value_info("lora_B", TensorProto.FLOAT, ["rank", VOCABULARY]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "steps_in", VOCABULARY])]
    # The cache holds nothing that is read. It is as long as the longest row, also where that one has ended.
    nodes += [
        helper.make_node("Gather", ["ids_shape", "axis_0"], ["batch"]),
        helper.make_node("Gather", ["mask_shape", "axis"], ["total_1"]),
        helper.make_node("Concat", ["batch", "axis", "total_1", "width"], ["cache_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["cache_shape"], ["cache"]),
    ]
    constants |= {"axis_0": np.array([0], np.int64), "width": np.array([8], np.int64)}
    for kind in ("key", "value"):
        past, present = f"past_key_values.0.{kind}", f"present.0.{kind}"
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["batch", 1, "past", 8]))
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["batch", 1, "grown", 8]))
        nodes.append(helper.make_node("Identity", ["cache"], [present]))
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "script", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
