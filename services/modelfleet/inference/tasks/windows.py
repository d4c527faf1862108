"""Texts longer than the model are covered by windows; here their results become the text's."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def first_windows(window_counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the index of each text's first window."""
    return np.concatenate(([0], np.cumsum(window_counts[:-1], dtype=np.int64)))


def weighted_mean(rows: Floats, lengths: NDArray[np.int32], window_counts: NDArray[np.int32]) -> Floats:
    """
    Return the mean of each text's windows, weighted by their tokens: [texts, width] from [windows, width].

    `lengths` are the windows' tokens; `window_counts` says how many windows each text has, at least one.
    """
    if len(window_counts) == len(rows):
        return rows
    starts = first_windows(window_counts)
    weights = lengths.astype(np.float32)[:, None]
    sums = np.add.reduceat(rows * weights, starts, axis=0)
    means: Floats = (sums / np.add.reduceat(weights, starts, axis=0)).astype(np.float32, copy=False)
    return means


def best(rows: Floats, window_counts: NDArray[np.int32]) -> Floats:
    """Return the largest value of each text's windows: [texts, width] from [windows, width]."""
    if len(window_counts) == len(rows):
        return rows
    largest: Floats = np.maximum.reduceat(rows, first_windows(window_counts), axis=0)
    return largest
