"""Documents by relevance to a query."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelfleet.inference.tasks.classify import sigmoid

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's index in the request and its score."""

    index: int
    score: float


def logit(output: Floats) -> Floats:
    """
    Return the relevance logit of each row, [rows, 1].

    `output` is [rows, 1], [rows], or [rows, 2] of (irrelevant, relevant), whose difference has the softmax's second
    probability as its sigmoid.
    """
    output = output.reshape(len(output), -1)
    if output.shape[1] == 1:
        return output
    return output[:, 1:2] - output[:, 0:1]


def ranked(logits: Floats, *, raw: bool, top_k: int) -> list[Ranked]:
    """Return documents by falling score, at most `top_k` of them (0 for all); equal scores in order of the request."""
    scores = logits if raw else sigmoid(logits)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    return [Ranked(int(index), float(scores[index])) for index in order]
