"""Loaded models, as the engine runs them: from rows to a session's inputs, and from its outputs to one result a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.graph import table_rows
from modelfleet.bundle.manifest import Manifest, Pooling, Task
from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.canary import Canary
from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.jobs import Job
from modelfleet.inference.memory_budget import SessionMemory
from modelfleet.inference.session import RefusedInputs, RunCancellation, Session
from modelfleet.inference.statistics import ModelRecord
from modelfleet.inference.tasks import classify, embed, rerank
from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError

Inputs = Mapping[str, Array]
# From the output that is read, [rows, ...], and the rows' lengths to one array a row.
Reduce = Callable[[Array, NDArray[np.int64]], Iterable[Array]]


class TextModel:
    """
    A model whose rows are sequences of token ids; `Tokens` are the payload of its requests.

    `table_rows` is how many ids, and types of them, the graph has vectors of, by input, where its manifest may not say.
    `canary` is there once it is warmed up; where it has none, `unwatched` says why.
    """

    def __init__(self, name: str, manifest: Manifest, session: Session, limits: BatchLimits) -> None:
        self.name = name
        self.manifest = manifest
        self.session = session
        self.limits = limits
        self.record = ModelRecord()
        self.memory = SessionMemory()
        self.canary: Canary | None = None
        self.unwatched = ""
        self._inputs = {spec.name: spec.dtype for spec in session.inputs}
        _check_text_inputs(session.inputs)
        unsaid = manifest.vocabulary_size is None or "token_type_ids" in self._inputs
        self.table_rows = table_rows(session.graph) if unsaid else {}
        self.output = _chosen_output(session, manifest.output)
        self._reduce = _reduction(manifest, self.output)

    def collate(self, rows: Sequence[Row[Job]]) -> Inputs:
        """Return token ids padded to the longest row, and what else the graph asks for: each [rows, tokens]."""
        lengths = np.array([row.length for row in rows])
        shape = (len(rows), int(lengths.max()))
        inputs: dict[str, Array] = {}
        for name, dtype in self._inputs.items():
            if name == "input_ids":
                inputs[name] = _padded(shape, self.manifest.pad_token_id, dtype, rows, _ids)
            elif name == "token_type_ids":
                inputs[name] = _padded(shape, 0, dtype, rows, _type_ids)
            elif name == "attention_mask":
                inputs[name] = (np.arange(shape[1]) < lengths[:, None]).astype(dtype)
            elif name == "position_ids":
                inputs[name] = np.broadcast_to(np.arange(shape[1], dtype=dtype), shape)
        return inputs

    def run(self, inputs: Inputs, cancellation: RunCancellation) -> Array:
        """Return the output that the manifest names, or the first."""
        return self.session.run(inputs, [self.output.name], cancellation)[0]

    def reduce(self, outputs: Array, rows: Sequence[Row[Job]]) -> Sequence[Array]:
        """Return one float32 array a row; its shape is the task's."""
        lengths = np.array([row.length for row in rows])
        return list(self._reduce(outputs.astype(np.float32, copy=False), lengths))

    def new_cancellation(self) -> RunCancellation:
        """Return what can stop one run."""
        return RunCancellation()


class TensorModel:
    """
    A model of any tensors; a dict of arrays by input name is the payload of its requests.

    Where the first dimension of every input and output may vary, it counts elements: these are the rows, and requests
    whose other dimensions are equal share batches. Otherwise a request is one row and runs alone.

    `canary` is there once it is warmed up; where it has none, `unwatched` says why.
    """

    def __init__(self, name: str, manifest: Manifest, session: Session, limits: BatchLimits) -> None:
        self.name = name
        self.manifest = manifest
        self.session = session
        self.batches = bool(session.inputs) and all(
            spec.shape and spec.shape[0] is None for spec in (*session.inputs, *session.outputs)
        )
        self.limits = limits if self.batches else BatchLimits(max_tokens=1)
        self.record = ModelRecord()
        self.memory = SessionMemory()
        self.canary: Canary | None = None
        self.unwatched = ""
        self._outputs = [spec.name for spec in session.outputs]

    def collate(self, rows: Sequence[Row[Job]]) -> Inputs:
        """Return the rows' elements, one after another."""
        payloads: list[Inputs] = [row.request.payload for row in rows]
        if not self.batches:
            (payload,) = payloads
            return payload
        return {
            name: np.concatenate(
                [payload[name][row.index : row.index + 1] for payload, row in zip(payloads, rows, strict=True)]
            )
            for name in payloads[0]
        }

    def run(self, inputs: Inputs, cancellation: RunCancellation) -> list[Array]:
        """Return all outputs in the graph's order. Raises InvalidInputError for inputs that its operators refuse."""
        try:
            return self.session.run(inputs, self._outputs, cancellation)
        except RefusedInputs as error:
            raise InvalidInputError(
                f"The graph of {self.name} cannot compute with the values, or the sizes, of these inputs. Compare them "
                "with those that it was exported for; the server's log has the cause.",
                field="inputs",
            ) from error

    def reduce(self, outputs: list[Array], rows: Sequence[Row[Job]]) -> Sequence[list[Array]]:
        """Return the outputs of each row, in the graph's order."""
        if not self.batches:
            return [outputs]
        for name, output in zip(self._outputs, outputs, strict=True):
            if len(output) != len(rows):
                raise InvalidBundleError(
                    f"{self.name} got {len(rows)} elements and returned {len(output)} as {name!r}: its first dimension "
                    "is not a batch. Export it with a fixed first dimension."
                )
        return [[output[index : index + 1] for output in outputs] for index in range(len(rows))]

    def new_cancellation(self) -> RunCancellation:
        """Return what can stop one run."""
        return RunCancellation()


LoadedModel = TextModel | TensorModel
HeldModel = LoadedModel | GenerativeModel

_TEXT_INPUTS = frozenset({"input_ids", "token_type_ids", "attention_mask", "position_ids"})


def _check_text_inputs(specs: Sequence[TensorSpec]) -> None:
    names = {spec.name for spec in specs}
    if "input_ids" not in names or not names <= _TEXT_INPUTS:
        raise InvalidBundleError(
            f"The graph's inputs are {', '.join(sorted(names))}; a text model has input_ids and at most "
            f"{', '.join(sorted(_TEXT_INPUTS - {'input_ids'}))}. Serve other graphs with `task: tensor`.",
            field="model",
        )


def _chosen_output(session: Session, name: str | None) -> TensorSpec:
    if name is None:
        return session.outputs[0]
    for spec in session.outputs:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in session.outputs)
    raise InvalidBundleError(f"The manifest's output is {name!r}; the graph has {names}.", field="output")


def _reduction(manifest: Manifest, output: TensorSpec) -> Reduce:
    """Return what makes one array a row of a batch's output. Raises InvalidBundleError where shapes do not fit."""
    rank = len(output.shape)
    if manifest.task is Task.EMBED:
        _require_rank(manifest, output, 2, 3)
        # A graph with one vector a row has pooled already, whatever the manifest was inferred to say.
        pooling = Pooling.MODEL if rank == 2 else manifest.pooling  # noqa: PLR2004  [rows, dimensions]
        if pooling is Pooling.MODEL:
            _require_rank(manifest, output, 2)
        return lambda array, lengths: embed.pool(array, lengths, pooling)
    if manifest.task is Task.CLASSIFY:
        _require_rank(manifest, output, 2)
        _require_labels(manifest, output)
        return lambda array, _: classify.activate(array, manifest.activation)
    if manifest.task is Task.ENTITIES:
        _require_rank(manifest, output, 3)
        _require_labels(manifest, output)
        return lambda array, lengths: (
            row[:length] for row, length in zip(classify.softmax(array), lengths, strict=True)
        )
    if manifest.task is Task.RERANK:
        _require_rank(manifest, output, 1, 2)
        return lambda array, _: rerank.logit(array)
    raise InvalidBundleError(f"This worker does not serve the task {manifest.task.value!r}.", field="task")


def _require_rank(manifest: Manifest, output: TensorSpec, *ranks: int) -> None:
    if len(output.shape) not in ranks:
        raise InvalidBundleError(
            f"The output {output.name!r} has {len(output.shape)} dimensions; a model of the task "
            f"{manifest.task.value!r} has {' or '.join(str(rank) for rank in ranks)}. Name another with `output:`.",
            field="output",
        )


def _require_labels(manifest: Manifest, output: TensorSpec) -> None:
    width = output.shape[-1]
    if width is not None and width != len(manifest.labels):
        raise InvalidBundleError(
            f"The output {output.name!r} scores {width} labels; the manifest has {len(manifest.labels)}.",
            field="labels",
        )


def _padded(
    shape: tuple[int, int],
    fill: int,
    dtype: np.dtype[Any],
    rows: Sequence[Row[Job]],
    part: Callable[[Tokens], NDArray[Any] | None],
) -> Array:
    padded = np.full(shape, fill, dtype)
    for position, row in enumerate(rows):
        tokens: Tokens = row.request.payload
        values = part(tokens)
        if values is not None:
            start = tokens.starts[row.index]
            padded[position, : row.length] = values[start : start + row.length]
    return padded


def _ids(tokens: Tokens) -> NDArray[np.int32]:
    return tokens.ids


def _type_ids(tokens: Tokens) -> NDArray[np.uint8] | None:
    return tokens.type_ids
