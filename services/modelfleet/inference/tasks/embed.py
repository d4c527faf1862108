"""Vectors of texts."""

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.manifest import Pooling
from modelfleet.inference.tasks.windows import weighted_mean

Floats = NDArray[np.float32]


def pool(output: Floats, lengths: NDArray[np.int64], pooling: Pooling) -> Floats:
    """
    Return one vector for each row, [rows, dimensions].

    `output` is [rows, tokens, dimensions], or [rows, dimensions] where the graph pools; `lengths` are the rows' tokens
    that are no padding.
    """
    if pooling is Pooling.MODEL:
        return output
    if pooling is Pooling.CLS:
        return output[:, 0]
    if pooling is Pooling.LAST:
        vectors: Floats = output[np.arange(len(output)), lengths - 1]
        return vectors
    # The mean as a product with weights of 1/length on the real tokens: one pass over the largest array there is.
    weights = (np.arange(output.shape[1]) < lengths[:, None]) / lengths[:, None]
    means: Floats = np.matmul(weights[:, None, :].astype(output.dtype), output)[:, 0]
    return means


def assemble(
    vectors: Floats,
    lengths: NDArray[np.int32],
    window_counts: NDArray[np.int32],
    *,
    dimensions: int,
    normalize: bool,
) -> Floats:
    """
    Return one vector for each text, [texts, dimensions], from those of its windows.

    Windows weigh by their tokens. `dimensions` keeps only leading ones, 0 all. Norms are L2; a zero vector stays zero.
    """
    texts = weighted_mean(vectors, lengths, window_counts)
    if dimensions:
        texts = texts[:, :dimensions]
    if normalize:
        norms = np.linalg.norm(texts, axis=1, keepdims=True)
        texts = texts / np.maximum(norms, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(texts, dtype="<f4")
