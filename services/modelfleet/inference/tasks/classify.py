"""Labels of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.manifest import Activation

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its probability."""

    label: str
    score: float


def activate(logits: Floats, activation: Activation) -> Floats:
    """Return scores over the last axis: probabilities, or for NONE the logits as they are."""
    if activation is Activation.NONE:
        return logits
    return sigmoid(logits) if activation is Activation.SIGMOID else softmax(logits)


def softmax(logits: Floats) -> Floats:
    """Return probabilities that sum to 1 over the last axis."""
    # Shifting by the maximum changes nothing but keeps exp from overflowing.
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-logits)), in a form that neither overflows nor rounds small probabilities to 0."""
    probabilities: Floats = np.exp(np.minimum(logits, 0)) / (1 + np.exp(-np.abs(logits)))
    return probabilities


def ranked(probabilities: Floats, labels: Sequence[str], top_k: int) -> list[LabelScore]:
    """Return the labels of one text by falling score, at most `top_k` of them (0 for all)."""
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    return [LabelScore(labels[index], float(probabilities[index])) for index in order]


def all_ranked(probabilities: Floats, labels: Sequence[str], top_k: int) -> list[list[LabelScore]]:
    """Do `ranked` for each text of probabilities [texts, labels]."""
    return [ranked(row, labels, top_k) for row in probabilities]
