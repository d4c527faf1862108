"""Accuracy and F1 of a form of a classifier on labelled texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelfleet.bundle.golden import Array
from modelfleet.bundle.manifest import Activation, Manifest, Task
from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.export.drift import answers
from modelfleet_tools.export.source import Inputs


@dataclass(frozen=True, slots=True)
class Labelled:
    """Batches of texts as inputs, and each text's label."""

    batches: Sequence[Inputs]
    labels: Sequence[str]


@dataclass(frozen=True, slots=True)
class Quality:
    """Share of right labels, and the mean of the labels' F1."""

    accuracy: float | None
    f1: float | None


def check_labels(labels: Sequence[str], manifest: Manifest) -> None:
    """Raise InvalidInputError unless the model is a classifier and knows all labels of the data."""
    if manifest.task is not Task.CLASSIFY or manifest.activation is not Activation.SOFTMAX:
        raise InvalidInputError("Accuracy is measured of `classify` models with one right label. Leave --data out.")
    if unknown := sorted(set(labels) - set(manifest.labels)):
        raise InvalidInputError(
            f"The data has the labels {', '.join(unknown[:8])}, the model {', '.join(manifest.labels)}. Name the "
            "model's outputs with --labels, in their order, or correct the data.",
            field="labels",
        )


def quality(run: Callable[[Inputs], Mapping[str, Array]], manifest: Manifest, data: Labelled) -> Quality:
    """Return how often the model is right."""
    from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415  takes a second to import

    found: list[str] = []
    for batch in data.batches:
        outputs = run(batch)
        best = answers(manifest, batch, outputs[manifest.output or next(iter(outputs))]).argmax(axis=-1)
        found += [manifest.labels[index] for index in best.tolist()]
    return Quality(
        float(accuracy_score(data.labels, found)), float(f1_score(data.labels, found, average="macro", zero_division=0))
    )
