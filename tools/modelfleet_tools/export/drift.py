"""How much an answer changes: measured on what callers get, not on raw tensors."""

from collections.abc import Mapping

import numpy as np
from modelfleet.bundle.golden import Array, difference
from modelfleet.bundle.manifest import Activation, Manifest, Pooling, Task
from numpy.typing import NDArray

from modelfleet_tools.export.source import Inputs

Floats = NDArray[np.float64]


def drift(manifest: Manifest, inputs: Inputs, recorded: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    """
    Return the largest change of an answer in a batch.

    For `embed` that is 1 - cosine of a text's vectors; for `classify`, `entities` and `rerank` the change of a
    probability; for `tensor` the difference as a share of the largest magnitude.
    """
    if manifest.task is Task.TENSOR:
        return max(difference(array, got[name]) for name, array in recorded.items())
    name = manifest.output or next(iter(recorded))
    before, after = (answers(manifest, inputs, outputs[name]) for outputs in (recorded, got))
    if manifest.task is Task.EMBED:
        return float(np.max(1 - (before * after).sum(axis=-1)))
    mask = _mask(inputs) if manifest.task is Task.ENTITIES else np.ones(len(before), bool)
    return float(np.abs(after - before)[mask].max())


def answers(manifest: Manifest, inputs: Inputs, output: Array) -> Floats:
    """Return vectors of norm 1 [texts, dimensions], or probabilities [texts, labels] or [texts, tokens, labels]."""
    floats = output.astype(np.float64)
    if manifest.task is Task.EMBED:
        vectors = _pooled(manifest.pooling, floats, _mask(inputs))
        norms: Floats = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    if manifest.task is Task.RERANK and floats.shape[-1] > 1:
        floats = floats[..., 1:2] - floats[..., 0:1]
    if manifest.task is Task.RERANK or manifest.activation is Activation.SIGMOID:
        scores: Floats = np.exp(np.minimum(floats, 0)) / (1 + np.exp(-np.abs(floats)))
        return scores
    return softmax(floats)


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Return probabilities along the last axis."""
    floats = logits.astype(np.float64)
    exponentials = np.exp(floats - floats.max(axis=-1, keepdims=True))
    probabilities: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def _pooled(pooling: Pooling, output: Floats, mask: NDArray[np.bool_]) -> Floats:
    if output.ndim == 2:  # noqa: PLR2004  the graph pools by itself
        return output
    match pooling:
        case Pooling.CLS:
            return output[:, 0]
        case Pooling.LAST:
            last: Floats = output[np.arange(len(output)), mask.sum(axis=1) - 1]
            return last
    weights = mask / mask.sum(axis=1, keepdims=True)
    means: Floats = np.einsum("bt,btd->bd", weights, output)
    return means


def _mask(inputs: Inputs) -> NDArray[np.bool_]:
    if "attention_mask" in inputs:
        return inputs["attention_mask"].astype(bool)
    return np.ones(inputs["input_ids"].shape, bool)
