"""
Small real models: ONNX graphs of a few nodes, as bundles with the word pieces of `small_tokenizers`.

Text models look each token id up in a table of fixed random numbers, so that tests can work out what comes of a text.
"""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.models import LoadedModel, TensorModel, TextModel
from modelfleet.inference.session import Device, Session, SessionOptions
from modelfleet.inference.sharing import Sharing
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from harness.small_tokenizers import digest_of, wordpiece_json

VOCABULARY_SIZE = len(json.loads(wordpiece_json())["model"]["vocab"])
MAX_TOKENS = 16
DIMENSIONS = 4
LABELS = ("no", "maybe", "yes")
ENTITY_LABELS = ("O", "B-CAT", "I-CAT", "B-MAT", "I-MAT")
LIMITS = BatchLimits(max_tokens=64, min_fill=0.0)

_random = np.random.default_rng(7)
VECTORS = _random.normal(size=(VOCABULARY_SIZE, DIMENSIONS)).astype(np.float32)
LABEL_LOGITS = _random.normal(size=(VOCABULARY_SIZE, len(LABELS))).astype(np.float32)
ENTITY_LOGITS = 4 * _random.normal(size=(VOCABULARY_SIZE, len(ENTITY_LABELS))).astype(np.float32)
RELEVANCE = _random.normal(size=(VOCABULARY_SIZE, 1)).astype(np.float32)

_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64
_OPSET, _IR_VERSION = 18, 9


def embedder() -> ModelProto:
    """Token vectors [batch, tokens, 4], each drawn to the mean of its text, so that a wrong mask shows."""
    return _text_model(
        VECTORS,
        [helper.make_node("Add", ["looked_up", "mean_kept"], ["last_hidden_state"])],
        _value("last_hidden_state", _FLOAT, ["batch", "tokens", DIMENSIONS]),
    )


def embedder_of_types() -> ModelProto:
    """Token vectors [batch, tokens, 4], to each of which that of its type, 0 or 1, is added."""
    return _text_model(
        VECTORS,
        [
            helper.make_node("Gather", ["type_table", "token_type_ids"], ["of_type"]),
            helper.make_node("Add", ["looked_up", "of_type"], ["last_hidden_state"]),
        ],
        _value("last_hidden_state", _FLOAT, ["batch", "tokens", DIMENSIONS]),
        _value("token_type_ids", _INT64, ["batch", "tokens"]),
        type_table=np.eye(2, DIMENSIONS, dtype=np.float32),
    )


def embedder_of_masked_ids() -> ModelProto:
    """As `embedder`, of ids that are computed with before they are looked up."""
    graph = embedder()
    graph.graph.node[0].input[1] = "masked_ids"
    graph.graph.node.insert(0, helper.make_node("Mul", ["input_ids", "attention_mask"], ["masked_ids"]))
    return graph


def pooled_embedder() -> ModelProto:
    """Vectors [batch, 4]: the mean, with norm 1."""
    return _text_model(
        VECTORS,
        [helper.make_node("LpNormalization", ["mean"], ["sentence_embedding"], axis=1, p=2)],
        _value("sentence_embedding", _FLOAT, ["batch", DIMENSIONS]),
    )


def classifier() -> ModelProto:
    """Logits [batch, 3]: the mean of the tokens' LABEL_LOGITS."""
    return _text_model(
        LABEL_LOGITS,
        [helper.make_node("Identity", ["mean"], ["logits"])],
        _value("logits", _FLOAT, ["batch", len(LABELS)]),
    )


def labeller() -> ModelProto:
    """Logits [batch, tokens, 5]: ENTITY_LOGITS of each token, whatever stands around it."""
    return _text_model(
        ENTITY_LOGITS,
        [helper.make_node("Identity", ["looked_up"], ["logits"])],
        _value("logits", _FLOAT, ["batch", "tokens", len(ENTITY_LABELS)]),
    )


def cross_encoder() -> ModelProto:
    """Logits [batch, 1]: the sum of RELEVANCE over the tokens of the document, which are those of type 1."""
    return _text_model(
        RELEVANCE,
        [
            helper.make_node("Cast", ["token_type_ids"], ["types"], to=_FLOAT),
            helper.make_node("Unsqueeze", ["types", "last"], ["second"]),
            helper.make_node("Mul", ["kept", "second"], ["of_document"]),
            helper.make_node("ReduceSum", ["of_document", "token_axis"], ["logits"], keepdims=0),
        ],
        _value("logits", _FLOAT, ["batch", 1]),
        _value("token_type_ids", _INT64, ["batch", "tokens"]),
    )


def text_model_of_wrong_batch() -> ModelProto:
    """One vector for the whole batch, where one for each text is promised."""
    return _text_model(
        VECTORS,
        [helper.make_node("ReduceMean", ["mean", "batch_axis"], ["embeddings"], keepdims=1)],
        _value("embeddings", _FLOAT, ["batch", DIMENSIONS]),
    )


def affine() -> ModelProto:
    """y = 2x + 1, float [any, 3]."""
    return _model(
        [helper.make_node("Mul", ["x", "two"], ["doubled"]), helper.make_node("Add", ["doubled", "one"], ["y"])],
        [_value("x", _FLOAT, ["batch", 3])],
        [_value("y", _FLOAT, ["batch", 3])],
        two=np.float32(2),
        one=np.float32(1),
    )


def logarithm() -> ModelProto:
    """y = log(x), float [any, 1]: not finite where x is not positive."""
    return _model(
        [helper.make_node("Log", ["x"], ["y"])],
        [_value("x", _FLOAT, ["batch", 1])],
        [_value("y", _FLOAT, ["batch", 1])],
    )


def large(size: int) -> ModelProto:
    """As `affine`, with as many bytes of weights, all 0, of which the batch's size chooses one to add."""
    return _model(
        [
            helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
            helper.make_node("Gather", ["weights", "rows"], ["weight"]),
            helper.make_node("Mul", ["x", "two"], ["doubled"]),
            helper.make_node("Add", ["doubled", "one"], ["shifted"]),
            helper.make_node("Add", ["shifted", "weight"], ["y"]),
        ],
        [_value("x", _FLOAT, ["batch", 3])],
        [_value("y", _FLOAT, ["batch", 3])],
        two=np.float32(2),
        one=np.float32(1),
        weights=np.zeros(size // 4, np.float32),
    )


def fixed_batch() -> ModelProto:
    """y = the larger of x in each column, float [2, 3] -> [1, 3]: takes exactly two rows, and mixes them."""
    return _model(
        [helper.make_node("ReduceMax", ["x", "batch_axis"], ["y"], keepdims=1)],
        [_value("x", _FLOAT, [2, 3])],
        [_value("y", _FLOAT, [1, 3])],
        batch_axis=np.array([0], np.int64),
    )


def two_inputs() -> ModelProto:
    """sum = a + b and difference = a - b, of a float [any, 2] and b int64 [any, 2]."""
    return _model(
        [
            helper.make_node("Cast", ["b"], ["b_float"], to=_FLOAT),
            helper.make_node("Add", ["a", "b_float"], ["sum"]),
            helper.make_node("Sub", ["a", "b_float"], ["difference"]),
        ],
        [_value("a", _FLOAT, ["batch", 2]), _value("b", _INT64, ["batch", 2])],
        [_value("sum", _FLOAT, ["batch", 2]), _value("difference", _FLOAT, ["batch", 2])],
    )


def image() -> ModelProto:
    """Mean of each of three planes: float [any, 3, 8, 8] -> [any, 3]."""
    return _model(
        [helper.make_node("ReduceMean", ["pixels", "plane"], ["means"], keepdims=0)],
        [_value("pixels", _FLOAT, ["batch", 3, 8, 8])],
        [_value("means", _FLOAT, ["batch", 3])],
        plane=np.array([2, 3], np.int64),
    )


def echo(dtype: int) -> ModelProto:
    """y = x, of any dtype of `onnx.TensorProto`, [any, 2]."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [_value("x", dtype, ["batch", 2])],
        [_value("y", dtype, ["batch", 2])],
    )


def chooser() -> ModelProto:
    """y = the row of VECTORS of which x is the number, int64 [any] -> [any, 4]."""
    return _model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [_value("x", _INT64, ["batch"])],
        [_value("y", _FLOAT, ["batch", DIMENSIONS])],
        table=VECTORS,
    )


def scalars() -> ModelProto:
    """y = x, float [any]: a batch of numbers."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [_value("x", _FLOAT, ["batch"])],
        [_value("y", _FLOAT, ["batch"])],
    )


def slow() -> ModelProto:
    """y = x, float [any, 1], after as many matrix products (about 10 us each) as the largest x says."""
    step = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "weights"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next_state"]),
            helper.make_node("Identity", ["go_on"], ["still"]),
        ],
        "step",
        [
            _value("number", _INT64, []),
            _value("go_on", TensorProto.BOOL, []),
            _value("state", _FLOAT, [64, 64]),
        ],
        [_value("still", TensorProto.BOOL, []), _value("next_state", _FLOAT, [64, 64])],
    )
    return _model(
        [
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["times"], to=_INT64),
            helper.make_node("Loop", ["times", "", "weights"], ["end_state"], body=step),
            helper.make_node("ReduceSum", ["end_state"], ["total"], keepdims=0),
            helper.make_node("Mul", ["total", "zero"], ["nothing"]),
            helper.make_node("Add", ["x", "nothing"], ["y"]),
        ],
        [_value("x", _FLOAT, ["batch", 1])],
        [_value("y", _FLOAT, ["batch", 1])],
        weights=0.1 * np.eye(64, dtype=np.float32),
        zero=np.float32(0),
    )


@dataclass(frozen=True)
class SampleBundle:
    """A bundle, and the contents of its files by SHA-256."""

    bundle: Bundle
    contents: Mapping[str, bytes]

    async def download(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """Yield a file in pieces, as the manager does."""
        for start in range(offset, len(self.contents[sha256]), 1000):
            yield self.contents[sha256][start : start + 1000]


def text_bundle(graph: ModelProto, task: Task, *, tokenizer: bytes | None = None, **manifest: object) -> SampleBundle:
    """Return a text model with its `tokenizer.json`, by default the word pieces. `manifest` overrides."""
    fields = {
        "task": task,
        "model": "model.onnx",
        "tokenizer": "tokenizer.json",
        "max_tokens": MAX_TOKENS,
        "vocabulary_size": VOCABULARY_SIZE,
        "labels": {Task.CLASSIFY: LABELS, Task.ENTITIES: ENTITY_LABELS}.get(task, ()),
    }
    files = {"model.onnx": graph.SerializeToString(), "tokenizer.json": tokenizer or wordpiece_json()}
    return _bundle(files, Manifest.model_validate(fields | manifest))


def tensor_bundle(graph: ModelProto, **manifest: object) -> SampleBundle:
    """Return a `tensor` model."""
    return _bundle(
        {"model.onnx": graph.SerializeToString()},
        Manifest.model_validate({"task": Task.TENSOR, "model": "model.onnx", **manifest}),
    )


def write(sample: SampleBundle, directory: Path) -> Path:
    """Write the files under their paths, as a folder to push; return it."""
    for file in sample.bundle.files:
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.contents[file.sha256])
    return directory


def cpu_options(directory: Path) -> SessionOptions:
    """Return options for sessions of one thread."""
    return SessionOptions(Device.CPU, device_id=0, threads=1, device_memory_bytes=0, engine_cache=directory)


def load(sample: SampleBundle, directory: Path, *, name: str = "m@1", limits: BatchLimits = LIMITS) -> LoadedModel:
    """Load a bundle into a session of its own, whose rows share batches where its graph's axes allow that."""
    manifest = sample.bundle.manifest
    session = Session(write(sample, directory / name) / manifest.model, cpu_options(directory))
    kind = TensorModel if manifest.task is Task.TENSOR else TextModel
    model = kind(name, manifest, session, limits)
    model.sharing = Sharing(model.widest)
    return model


def _bundle(files: Mapping[str, bytes], manifest: Manifest) -> SampleBundle:
    described = tuple(BundleFile(path, digest_of(content), len(content)) for path, content in files.items())
    return SampleBundle(Bundle(described, manifest), {digest_of(content): content for content in files.values()})


def _text_model(
    table: np.ndarray,
    nodes: list[object],
    output: ValueInfoProto,
    *more_inputs: ValueInfoProto,
    **constants: np.ndarray,
) -> ModelProto:
    """
    Return `nodes` behind those that read a table of [vocabulary, n].

    They find looked_up, kept (where padding is 0) and mean_kept [batch, tokens or 1, n], and mean [batch, n].
    """
    look_up = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked_up"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=_FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask_column"]),
        helper.make_node("Mul", ["looked_up", "mask_column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "token_axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["mask_column", "token_axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean_kept"]),
        helper.make_node("Squeeze", ["mean_kept", "token_axis"], ["mean"]),
    ]
    inputs = [_value(name, _INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")]
    return _model(
        [*look_up, *nodes],
        [*inputs, *more_inputs],
        [output],
        **constants,
        table=table,
        last=np.array([-1], np.int64),
        token_axis=np.array([1], np.int64),
        batch_axis=np.array([0], np.int64),
    )


def _model(
    nodes: list[object], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], **constants: np.ndarray
) -> ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def _value(name: str, dtype: int, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)
