"""
The classification extension: an output's largest numbers as strings, in place of the numbers.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from collections.abc import Mapping

import numpy as np

from modelfleet.inference.models import HeldModel, TensorModel
from modelfleet.inference.tensor_spec import Array
from modelfleet.runtime.errors import InvalidInputError


def classified(outputs: Mapping[str, Array], wanted: Mapping[str, int], model: HeldModel) -> dict[str, Array]:
    """
    Return the wanted outputs, where classes are asked for as BYTES [rows, classes] of `value:index`, largest first.

    Of a model that does not batch, the shape is [classes]. Behind them stands the label, where the manifest names one
    for each index. Raises InvalidInputError for outputs that are not numbers.
    """
    return {
        name: _classes(name, outputs[name], count, model) if count else outputs[name] for name, count in wanted.items()
    }


def _classes(name: str, array: Array, count: int, model: HeldModel) -> Array:
    if not isinstance(model, TensorModel):
        raise InvalidInputError(
            f"The output {name!r} of a model of the task {model.manifest.task.value!r} is not classified again: "
            "models of the task 'classify' answer scores and labels, best first, and take the parameter top_k.",
            field="outputs",
        )
    if array.dtype.kind not in "fiu":
        raise InvalidInputError(f"The output {name!r} has no numbers to classify by.", field="outputs")
    rows = array.reshape(len(array) if model.batches else 1, -1)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    labels = model.manifest.labels if len(model.manifest.labels) == rows.shape[1] else ()
    found = np.empty(best.shape, object)
    for (row, place), index in np.ndenumerate(best):
        value = rows[row, index]
        shown = f"{value:f}" if array.dtype.kind == "f" else str(value)
        found[row, place] = ":".join((shown, str(index), *labels[index : index + 1])).encode()
    return found if model.batches else found[0]
