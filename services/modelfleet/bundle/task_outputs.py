"""What the output of a graph must be for its task: held against it when it is pushed, exported and loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from modelfleet.bundle.manifest import Activation, Manifest, Pooling, Task
from modelfleet.runtime.errors import InvalidBundleError


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How many dimensions an output may have, what they are, and what its numbers are."""

    ranks: tuple[int, ...]
    axes: str
    numbers: str


FORMS: Mapping[Task, OutputForm] = MappingProxyType(
    {
        Task.EMBED: OutputForm((2, 3), "[texts, tokens, dimensions], or [texts, dimensions] where it pools", "vectors"),
        Task.CLASSIFY: OutputForm((2,), "[texts, labels]", "logits"),
        Task.ENTITIES: OutputForm((3,), "[texts, tokens, labels]", "logits"),
        Task.RERANK: OutputForm((1, 2), "[texts], [texts, 1], or [texts, 2] of irrelevant and relevant", "logits"),
    }
)

_RERANK_WIDTHS = (1, 2)
# Output layers are padded to a multiple of this at most, so that matrices are quick.
_VOCABULARY_PADDING = 128


def check_output(manifest: Manifest, name: str, dtype: np.dtype[np.generic], shape: Sequence[int | None]) -> None:
    """
    Raise InvalidBundleError where an output cannot be what the task of a text model reads.

    `shape` has None where a size may vary.
    """
    form, width = FORMS[manifest.task], shape[-1] if shape else None
    if not np.issubdtype(dtype, np.floating):
        raise _refusal(manifest, name, f"has the dtype {dtype}, and {form.numbers} are floats")
    if len(shape) not in form.ranks:
        raise _refusal(manifest, name, f"has {len(shape)} dimensions, and it must be {form.axes}")
    if manifest.task is Task.EMBED:
        _check_vectors(manifest, name, shape)
    elif manifest.task is Task.RERANK and len(shape) > 1 and width not in (None, *_RERANK_WIDTHS):
        raise _refusal(manifest, name, f"has {width} scores a text, and it must be {form.axes}")
    elif manifest.task in (Task.CLASSIFY, Task.ENTITIES):
        if width is not None and width != len(manifest.labels):
            raise _refusal(
                manifest, name, f"scores {width} labels, and the manifest has {len(manifest.labels)}", "labels"
            )
        if manifest.task is Task.CLASSIFY and len(manifest.labels) == 1 and manifest.activation is Activation.SOFTMAX:
            raise _refusal(
                manifest,
                name,
                "scores one label, whose softmax is 1 for every text: write `activation: sigmoid`, or `none` for a "
                "regression, into modelfleet.yaml",
                "activation",
            )


def _check_vectors(manifest: Manifest, name: str, shape: Sequence[int | None]) -> None:
    width, pooled = shape[-1], len(shape) == min(FORMS[Task.EMBED].ranks)
    if manifest.pooling is Pooling.MODEL and not pooled:
        raise _refusal(manifest, name, "has a vector for each token, and `pooling: model` promises one for each text")
    vocabulary = manifest.vocabulary_size
    # Proteins, bytes and characters have vocabularies that are narrower than the vectors of their models.
    if width is not None and vocabulary and vocabulary <= width < vocabulary + _VOCABULARY_PADDING:
        raise _refusal(
            manifest, name, f"is as wide as the vocabulary ({width}): these are logits of tokens, not vectors of texts"
        )
    if width is not None and (manifest.truncate_dimensions or 0) > width:
        raise _refusal(
            manifest, name, f"has {width} dimensions, and truncate_dimensions is {manifest.truncate_dimensions}"
        )


def _refusal(manifest: Manifest, name: str, problem: str, field: str = "output") -> InvalidBundleError:
    return InvalidBundleError(
        f"The output {name!r} of the graph {problem}. A model of the task {manifest.task.value!r} cannot read that: "
        "name another output with `output:`, another task with `task:`, or export the graph for it.",
        field=field,
    )
