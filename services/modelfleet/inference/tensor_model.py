"""A model of any tensors: from the elements of requests to a session's inputs, and from its outputs back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from modelfleet.bundle.manifest import Batching, Manifest
from modelfleet.inference.batching import BatchLimits, Row
from modelfleet.inference.finiteness import is_finite, not_finite
from modelfleet.inference.jobs import Job
from modelfleet.inference.session import RefusedInputs, RunCancellation, Session
from modelfleet.inference.session_model import SessionModel
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, NotFiniteError

Inputs = Mapping[str, Array]


class TensorModel(SessionModel):
    """
    A model of any tensors; a dict of arrays by input name is the payload of its requests.

    Where rows may share a batch, the first dimension of every input and output counts them, and requests whose other
    dimensions are equal run together. Otherwise a request is one row and runs alone.
    """

    def __init__(self, name: str, manifest: Manifest, session: Session, limits: BatchLimits) -> None:
        super().__init__(name, manifest, session, limits)
        self._outputs = [spec.name for spec in session.outputs]

    @property
    def widest(self) -> Batching:
        """The most that rows of such a graph could share: nothing where a first dimension is fixed, or missing."""
        specs = (*self.session.inputs, *self.session.outputs)
        varies = bool(self.session.inputs) and all(spec.shape and spec.shape[0] is None for spec in specs)
        return Batching.SAME_SHAPE if varies else Batching.ALONE

    @property
    def batches(self) -> bool:
        """Whether first dimensions count rows."""
        return self.sharing.batching is not Batching.ALONE

    @property
    def limits(self) -> BatchLimits:
        """What one batch may hold, in rows."""
        return self._device_limits if self.batches else replace(self._device_limits, max_rows=1)

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

    def reduce(self, outputs: list[Array], rows: Sequence[Row[Job]]) -> Sequence[list[Array] | NotFiniteError]:
        """Return the outputs of each row, in the graph's order. A row that is not finite has an error instead."""
        if not self.batches:
            return [self._checked(outputs)]
        for name, output in zip(self._outputs, outputs, strict=True):
            if len(output) != len(rows):
                raise InvalidBundleError(
                    f"{self.name} got {len(rows)} rows and returned {len(output)} as {name!r}: its first dimension is "
                    "not a batch. Write `batching: alone` into its manifest."
                )
        return [self._checked([output[index : index + 1] for output in outputs]) for index in range(len(rows))]

    def _checked(self, outputs: list[Array]) -> list[Array] | NotFiniteError:
        if self.manifest.allow_nan or all(map(is_finite, outputs)):
            return outputs
        return not_finite(self.name, "Set `allow_nan: true` in its manifest if that is an answer.")
