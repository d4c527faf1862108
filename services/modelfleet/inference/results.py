"""What the pipeline answers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.tasks import classify, entities, rerank
from modelfleet.inference.tensor_spec import Array
from modelfleet.inference.tokens import TextUsage

Floats = NDArray[np.float32]

INLINE_SCORES = 1000
"""Scores that are ranked and written in the event loop; more take long enough for a thread."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [texts, dimensions]."""

    version: VersionKey
    vectors: Floats
    usage: list[TextUsage]


@dataclass(frozen=True, slots=True)
class Classified:
    """For each text its labels by falling score."""

    version: VersionKey
    labels: list[list[classify.LabelScore]]
    usage: list[TextUsage]


@dataclass(frozen=True, slots=True)
class Extracted:
    """For each text its entities in order."""

    version: VersionKey
    entities: list[list[entities.Entity]]
    usage: list[TextUsage]


@dataclass(frozen=True, slots=True)
class Reranked:
    """Documents by falling score; `usage` is by index in the request."""

    version: VersionKey
    documents: list[rerank.Ranked]
    usage: list[TextUsage]


@dataclass(frozen=True, slots=True)
class Inferred:
    """Outputs by name."""

    version: VersionKey
    outputs: dict[str, Array]
