"""A model that reads token ids: from rows to a session's inputs, and from its output to one result a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.graph import table_rows
from modelfleet.bundle.manifest import Batching, Manifest, Pooling, Task
from modelfleet.bundle.task_outputs import FORMS, check_output
from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.finiteness import finite_rows, not_finite
from modelfleet.inference.jobs import Job
from modelfleet.inference.session import RefusedInputs, RunCancellation, Session
from modelfleet.inference.session_model import SessionModel
from modelfleet.inference.tasks import classify, embed, rerank
from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, NotFiniteError

Inputs = Mapping[str, Array]
# From the output that is read, [rows, ...], and the rows' lengths to one array a row.
Reduce = Callable[[Array, NDArray[np.int64]], Sequence[Array] | Array]

_ROWS_OF_NUMBERS = 2  # [rows, numbers]
_TEXT_INPUTS = frozenset({"input_ids", "token_type_ids", "attention_mask", "position_ids"})


class TextModel(SessionModel):
    """
    A model whose rows are sequences of token ids; `Tokens` are the payload of its requests.

    Where the graph fixes how many rows or tokens it takes, batches are filled up to that. `max_tokens`,
    `vocabulary_size` and `type_count` are what the graph can do, None where nobody knows; a self-test may lower them.
    """

    def __init__(self, name: str, manifest: Manifest, session: Session, limits: BatchLimits) -> None:
        super().__init__(name, manifest, session, limits)
        self._inputs = {spec.name: spec.dtype for spec in session.inputs}
        self.fixed_rows, self.fixed_tokens = _fixed_axes(session.inputs)
        assert manifest.max_tokens
        self.max_tokens = min(manifest.max_tokens, self.fixed_tokens or manifest.max_tokens)
        tables = table_rows(session.graph)
        self.vocabulary_size = tables.get("input_ids", manifest.vocabulary_size)
        self.type_count = tables.get("token_type_ids")
        self.output = _chosen_output(session, manifest.output)
        self._reduce = _reduction(manifest, self.output)

    @property
    def widest(self) -> Batching:
        """The most that rows of such a graph could share."""
        return Batching.ALONE if self.fixed_rows == 1 else Batching.PADDED

    @property
    def limits(self) -> BatchLimits:
        """What one batch may hold, of rows that may share one."""
        limits, batching = self._device_limits, self.sharing.batching
        if self.fixed_tokens:  # whatever their lengths, rows cost the same
            rows = max(1, limits.max_tokens // self.fixed_tokens)
            limits = replace(limits, min_fill=0.0, max_rows=min(rows, limits.max_rows))
        elif batching is Batching.SAME_SHAPE:
            limits = replace(limits, min_fill=1.0, free_tokens=0)
        if batching is Batching.ALONE:
            return replace(limits, max_rows=1)
        return replace(limits, max_rows=min(limits.max_rows, self.fixed_rows or limits.max_rows))

    def collate(self, rows: Sequence[Row[Job]]) -> Inputs:
        """Return token ids padded to the longest row, and what else the graph asks for: each [rows, tokens]."""
        rows = [*rows, *[rows[0]] * ((self.fixed_rows or 0) - len(rows))]
        lengths = np.array([row.length for row in rows])
        shape = (len(rows), self.fixed_tokens or int(lengths.max()))
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
        """Return the output that the manifest names, or the first. Raises InvalidInputError for ids it refuses."""
        try:
            return self.session.run(inputs, [self.output.name], cancellation)[0]
        except RefusedInputs as error:
            raise InvalidInputError(
                f"The graph of {self.name} cannot compute with the tokens of this input. Leave out what is unusual in "
                "it, such as special tokens spelled in the text; the server's log has the cause."
            ) from error

    def reduce(self, outputs: Array, rows: Sequence[Row[Job]]) -> Sequence[Array | NotFiniteError]:
        """Return one float32 array a row; its shape is the task's. A row that is not finite has an error instead."""
        if self.output.shape[-1:] == (None,):  # ONNX Runtime does not know it before
            check_output(self.manifest, self.output.name, outputs.dtype, outputs.shape)
        if self.fixed_rows and len(outputs) == self.fixed_rows:
            outputs = outputs[: len(rows)]
        lengths = np.array([row.length for row in rows])
        numbers = outputs.astype(np.float32, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):  # told below, by row
            results = self._reduce(numbers, lengths)
        # An activation hides an infinite logit. Of longer outputs only what was read of them counts.
        finite = finite_rows(numbers if numbers.ndim <= _ROWS_OF_NUMBERS else results)
        return [row if good else not_finite(self.name) for row, good in zip(results, finite, strict=True)]


def _fixed_axes(specs: Sequence[TensorSpec]) -> tuple[int | None, int | None]:
    """Return how many rows and tokens a graph takes where it fixes them. Raises InvalidBundleError for other inputs."""
    names = {spec.name for spec in specs}
    if "input_ids" not in names or not names <= _TEXT_INPUTS:
        raise InvalidBundleError(
            f"The graph's inputs are {', '.join(sorted(names))}; a text model has input_ids and at most "
            f"{', '.join(sorted(_TEXT_INPUTS - {'input_ids'}))}. Serve other graphs with `task: tensor`.",
            field="model",
        )
    rows, tokens = set[int](), set[int]()
    for spec in specs:
        if len(spec.shape) != _ROWS_OF_NUMBERS:
            raise InvalidBundleError(
                f"The graph's input {spec.name!r} has {len(spec.shape)} dimensions; a text model's have 2, rows and "
                "tokens. Serve other graphs with `task: tensor`.",
                field="model",
            )
        for found, size in zip((rows, tokens), spec.shape, strict=True):
            if size is not None:
                found.add(size)
    if len(rows) > 1 or len(tokens) > 1:
        raise InvalidBundleError(
            f"The graph's inputs fix different numbers of rows ({sorted(rows)}) or tokens ({sorted(tokens)}). Export "
            "it with one shape for all of them.",
            field="model",
        )
    return next(iter(rows), None), next(iter(tokens), None)


def _chosen_output(session: Session, name: str | None) -> TensorSpec:
    if name is None:
        return session.outputs[0]
    for spec in session.outputs:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in session.outputs)
    raise InvalidBundleError(f"The manifest's output is {name!r}; the graph has {names}.", field="output")


def _reduction(manifest: Manifest, output: TensorSpec) -> Reduce:
    """Return what makes one array a row of a batch's output. Raises InvalidBundleError where it cannot be read."""
    if manifest.task not in FORMS:
        raise InvalidBundleError(f"This worker does not serve the task {manifest.task.value!r}.", field="task")
    check_output(manifest, output.name, output.dtype, output.shape)
    if manifest.task is Task.EMBED:
        # A graph with one vector a row has pooled already, whatever the manifest was inferred to say.
        pooling = Pooling.MODEL if len(output.shape) == _ROWS_OF_NUMBERS else manifest.pooling
        return lambda array, lengths: embed.pool(array, lengths, pooling)
    if manifest.task is Task.CLASSIFY:
        return lambda array, _: classify.activate(array, manifest.activation)
    if manifest.task is Task.ENTITIES:
        return lambda array, lengths: [
            row[:length] for row, length in zip(classify.softmax(array), lengths, strict=True)
        ]
    return lambda array, _: rerank.logit(array)


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
