"""
Graphs whose rows are independent of each other, and graphs whose rows are not, which look the same from outside.

All are of random weights. `tensor` graphs take x, float [first axis, ...]; text graphs answer logits [batch, 3].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from modelfleet.bundle.manifest import Task
from onnx import ModelProto, TensorProto, helper, numpy_helper

from harness.graphs import LABELS, VOCABULARY_SIZE, SampleBundle, tensor_bundle, text_bundle

WIDTH = 4
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64
Nodes = list[tuple[str, list[str], list[str], dict[str, object]]]


@dataclass(frozen=True)
class Family:
    """Graphs of one kind. `shape` is that of x behind its first axis, None where it varies."""

    name: str
    make: Callable[[np.random.Generator], SampleBundle]
    shape: tuple[int | None, ...] = (WIDTH,)
    independent: bool = False


def _weights(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def _model(
    nodes: Nodes,
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    **constants: np.ndarray,
) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node(operator, read, made, **more) for operator, read, made, more in nodes],
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _of_rows(
    nodes: Nodes, width: int | str = WIDTH, **constants: np.ndarray
) -> Callable[[np.random.Generator], SampleBundle]:
    """Make x [n, 4] -> y [n, width]; constants are there, and random weights by name."""

    def make(random: np.random.Generator) -> SampleBundle:
        known = {
            "w": _weights(random, WIDTH, WIDTH),
            "zero": np.array([0]),
            "one": np.array([1]),
            "two": np.array([2]),
            "nought": np.array(0),
            "last": np.array([2**31]),
        } | constants
        used = {name: known[name] for node in nodes for name in node[1] if name in known}
        return tensor_bundle(_model(nodes, {"x": (_FLOAT, ["n", WIDTH])}, {"y": (_FLOAT, ["n", width])}, **used))

    return make


def _recurrent(*, time_first: bool) -> Callable[[np.random.Generator], SampleBundle]:
    """Make a GRU over x [n, time, 4], or [time, 4], whose steps are all answered."""

    def make(random: np.random.Generator) -> SampleBundle:
        hidden = 3
        constants = {
            "w": _weights(random, 1, 3 * hidden, WIDTH),
            "r": _weights(random, 1, 3 * hidden, hidden),
            "one": np.array([1]),
        }
        if time_first:
            nodes: Nodes = [
                ("Unsqueeze", ["x", "one"], ["steps"], {}),
                ("GRU", ["steps", "w", "r"], ["all"], {"hidden_size": hidden}),
                ("Squeeze", ["all", "both"], ["y"], {}),
            ]
            constants["both"] = np.array([1, 2])
            shape: list[int | str] = ["n", WIDTH]
            answered: list[int | str] = ["n", hidden]
        else:
            nodes = [
                ("Transpose", ["x"], ["steps"], {"perm": [1, 0, 2]}),
                ("GRU", ["steps", "w", "r"], ["all", "end"], {"hidden_size": hidden}),
                ("Squeeze", ["all", "one"], ["squeezed"], {}),
                ("Transpose", ["squeezed"], ["y"], {"perm": [1, 0, 2]}),
            ]
            shape, answered = ["n", "time", WIDTH], ["n", "time", hidden]
        used = constants if time_first else {name: constants[name] for name in ("w", "r", "one")}
        if time_first:
            used = {name: constants[name] for name in ("w", "r", "one", "both")}
        return tensor_bundle(_model(nodes, {"x": (_FLOAT, shape)}, {"y": (_FLOAT, answered)}, **used))

    return make


_SHIFTED: Nodes = [
    ("Slice", ["x", "zero", "minus_one", "zero"], ["before"], {}),
    ("Pad", ["before", "one_above"], ["shifted"], {}),
]

TENSORS = (
    Family("dense", _of_rows([("MatMul", ["x", "w"], ["z"], {}), ("Tanh", ["z"], ["y"], {})]), independent=True),
    Family("pooled", _of_rows([("ReduceMax", ["x", "one"], ["y"], {"keepdims": 1})], 1), independent=True),
    Family("recurrent", _recurrent(time_first=False), (None, WIDTH), independent=True),
    Family("time-major", _recurrent(time_first=True)),
    Family("cumulative", _of_rows([("CumSum", ["x", "nought"], ["y"], {})])),
    Family(
        "centred",
        _of_rows([("ReduceMean", ["x", "zero"], ["mean"], {"keepdims": 1}), ("Sub", ["x", "mean"], ["y"], {})]),
    ),
    Family("softmax over rows", _of_rows([("Softmax", ["x"], ["y"], {"axis": 0})])),
    Family("the largest row", _of_rows([("ReduceMax", ["x", "zero"], ["y"], {"keepdims": 1})])),
    Family("distinct rows", _of_rows([("Unique", ["x"], ["y"], {"axis": 0, "sorted": 1})])),
    Family(
        "the row before",
        _of_rows(
            [*_SHIFTED, ("Add", ["x", "shifted"], ["y"], {})],
            minus_one=np.array([-1]),
            one_above=np.array([1, 0, 0, 0]),
        ),
    ),
    Family(
        "detections",
        _of_rows(
            [
                ("Greater", ["x", "threshold"], ["found"], {}),
                ("NonZero", ["found"], ["where"], {}),
                ("Transpose", ["where"], ["boxes"], {}),
                ("Cast", ["boxes"], ["y"], {"to": _FLOAT}),
            ],
            2,
            threshold=np.float32(0.5),
        ),
    ),
    Family(
        "rare detections",
        _of_rows(
            [
                ("Greater", ["x", "threshold"], ["found"], {}),
                ("NonZero", ["found"], ["where"], {}),
                ("Transpose", ["where"], ["boxes"], {}),
                ("Cast", ["boxes"], ["y"], {"to": _FLOAT}),
            ],
            2,
            threshold=np.float32(2.0),
        ),
    ),
    Family(
        "sorted rows",
        _of_rows(
            [
                ("Shape", ["x"], ["rows"], {"start": 0, "end": 1}),
                ("TopK", ["x", "rows"], ["y", "order"], {"axis": 0}),
            ]
        ),
    ),
    Family(
        "counted rows",
        _of_rows(
            [
                ("Shape", ["x"], ["rows"], {"start": 0, "end": 1}),
                ("Cast", ["rows"], ["count"], {"to": _FLOAT}),
                ("Div", ["x", "count"], ["y"], {}),
            ]
        ),
    ),
)


def _of_texts(nodes: Nodes, *, masked: bool = True, **constants: np.ndarray) -> Callable[..., SampleBundle]:
    """Make a classifier: nodes read `vectors` [batch, tokens, 3], `mask` [batch, tokens, 1] and make `logits`."""

    def make(random: np.random.Generator) -> SampleBundle:
        look_up: Nodes = [("Gather", ["table", "input_ids"], ["vectors"], {})]
        if masked:
            look_up += [
                ("Cast", ["attention_mask"], ["flat_mask"], {"to": _FLOAT}),
                ("Unsqueeze", ["flat_mask", "last"], ["mask"], {}),
            ]
        known = {
            "table": _weights(random, VOCABULARY_SIZE, len(LABELS)),
            "last": np.array([-1]),
            "tokens": np.array([1]),
            "zero": np.array([0]),
            "nought": np.array(0),
            "pad": np.array(0, np.int64),
        } | constants
        known["table"][0] = 1  # padding is to show, if it is read
        used = {name: known[name] for node in look_up + nodes for name in node[1] if name in known}
        inputs: dict[str, tuple[int, list[int | str]]] = {"input_ids": (_INT64, ["batch", "tokens"])}
        if masked:
            inputs["attention_mask"] = (_INT64, ["batch", "tokens"])
        graph = _model(look_up + nodes, inputs, {"logits": (_FLOAT, ["batch", len(LABELS)])}, **used)
        return text_bundle(graph, Task.CLASSIFY)

    return make


_MASKED_MEAN: Nodes = [
    ("Mul", ["vectors", "mask"], ["kept"], {}),
    ("ReduceSum", ["kept", "tokens"], ["sum"], {"keepdims": 0}),
    ("ReduceSum", ["mask", "tokens"], ["count"], {"keepdims": 0}),
    ("Div", ["sum", "count"], ["mean"], {}),
]
# Each token looks at all others, as attention does; `distance` is what padding is moved away by.
_ATTENTION: Nodes = [
    ("Transpose", ["vectors"], ["across"], {"perm": [0, 2, 1]}),
    ("MatMul", ["vectors", "across"], ["raw_scores"], {}),
    ("Transpose", ["mask"], ["mask_row"], {"perm": [0, 2, 1]}),
    ("Sub", ["mask_row", "one"], ["padding"], {}),
    ("Mul", ["padding", "distance"], ["bias"], {}),
    ("Add", ["raw_scores", "bias"], ["scores"], {}),
    ("Softmax", ["scores"], ["weights"], {"axis": -1}),
    ("MatMul", ["weights", "vectors"], ["mixed"], {}),
    ("Gather", ["mixed", "nought"], ["logits"], {"axis": 1}),
]

TEXTS = (
    Family("masked mean", _of_texts([*_MASKED_MEAN, ("Identity", ["mean"], ["logits"], {})]), independent=True),
    Family("attention", _of_texts(_ATTENTION, one=np.float32(1), distance=np.float32(1e9)), independent=True),
    Family("leaking attention", _of_texts(_ATTENTION, one=np.float32(1), distance=np.float32(3))),
    Family(
        "mean of all", _of_texts([("ReduceMean", ["vectors", "tokens"], ["logits"], {"keepdims": 0})], masked=False)
    ),
    Family("mask unread", _of_texts([("ReduceMax", ["vectors", "tokens"], ["logits"], {"keepdims": 0})])),
    Family("last token", _of_texts([("Gather", ["vectors", "end"], ["logits"], {"axis": 1})], end=np.array(-1))),
    Family(
        "cumulative over texts",
        _of_texts([*_MASKED_MEAN, ("CumSum", ["mean", "nought"], ["logits"], {})]),
    ),
    Family(
        "mean of texts",
        _of_texts(
            [
                *_MASKED_MEAN,
                ("ReduceMean", ["mean", "zero"], ["of_all"], {"keepdims": 1}),
                ("Add", ["mean", "of_all"], ["logits"], {}),
            ]
        ),
    ),
    Family(
        "one answer for all texts",
        _of_texts([*_MASKED_MEAN, ("ReduceMean", ["mean", "zero"], ["logits"], {"keepdims": 1})]),
    ),
)
