"""Vectors of texts."""

from typing import Any

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
    real: NDArray[Any] = np.arange(output.shape[1]) < lengths[:, None]
    if pooling is Pooling.MAX:
        largest: Floats = np.where(real[..., None], output, -np.inf).max(axis=1)
        return largest
    # Means as a product with weights of the real tokens: one pass over the largest array there is.
    if pooling is Pooling.WEIGHTED_MEAN:
        positions = real * np.arange(1, output.shape[1] + 1)
        weights = positions / positions.sum(axis=1, keepdims=True)
    elif pooling is Pooling.MEAN_SQRT_LENGTH:
        weights = real / np.sqrt(lengths)[:, None]
    else:
        weights = real / lengths[:, None]
    means: Floats = np.matmul(weights[:, None, :].astype(output.dtype), output)[:, 0]
    return means


def assemble(
    vectors: Floats,
    lengths: NDArray[np.int32],
    window_counts: NDArray[np.int32],
    *,
    dimensions: int,
    normalize: bool,
    cut_last: bool = False,
) -> Floats:
    """
    Return one vector for each text, [texts, dimensions], from those of its windows.

    Windows weigh by their tokens. `dimensions` keeps only leading ones, 0 all. Norms are L2; a zero vector stays zero.
    What is cut has the norm 1 afterwards, or with `cut_last` before, as sentence-transformers has it by `truncate_dim`.
    """
    texts = weighted_mean(vectors, lengths, window_counts)
    if dimensions and not cut_last:
        texts = texts[:, :dimensions]
    if normalize:
        norms = np.linalg.norm(texts, axis=1, keepdims=True)
        texts = texts / np.maximum(norms, np.finfo(np.float32).tiny)
    if dimensions:
        texts = texts[:, :dimensions]
    return np.ascontiguousarray(texts, dtype="<f4")
