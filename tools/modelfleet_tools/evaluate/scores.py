"""How good answers are. Metrics are scikit-learn's and seqeval's; here they are only put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from seqeval.metrics import classification_report
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, ndcg_score, precision_recall_fscore_support

from modelfleet_tools.batch.tasks import Result
from modelfleet_tools.evaluate.examples import Example, Span

BINS = 10


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Of one label; `support` is how often the data has it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """`counts` is int64 [expected, predicted], by `labels`."""

    labels: tuple[str, ...]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """
    How often the first label is right beside how sure the model was of it, in bins of equal width that have examples.

    `error` is the expected calibration error: the mean distance of both over all examples. Guo et al. 2017,
    https://arxiv.org/abs/1706.04599
    """

    error: float
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scores:
    """
    What is known of a model.

    `overall` are named figures. `by_example` is float64 [examples], what two models are compared by, and
    `by_example_name` says what its mean is.
    """

    overall: dict[str, float]
    labels: tuple[LabelScores, ...]
    confusion: Confusion | None
    calibration: Calibration | None
    by_example: NDArray[np.float64]
    by_example_name: str


def score(task: str, examples: Sequence[Example], results: Sequence[Result]) -> Scores:
    """Return the scores of a task's answers."""
    return {"classify": _classified, "entities": _entities, "rerank": _ranked}[task](examples, results)


def _classified(examples: Sequence[Example], results: Sequence[Result]) -> Scores:
    expected = [example.expected.label for example in examples]
    predicted = [str(result.values["label"]) for result in results]
    confidence = np.array([cast("float", result.values["score"]) for result in results])
    right = np.array(expected) == np.array(predicted)
    labels = sorted(set(expected) | set(predicted))
    overall = {"accuracy": float(accuracy_score(expected, predicted))}
    for average in ("macro", "micro"):
        figures = precision_recall_fscore_support(expected, predicted, average=average, zero_division=0)
        overall |= {f"{name}_{average}": float(value) for name, value in zip(_NAMES, figures[:3], strict=True)}
    of_labels = precision_recall_fscore_support(expected, predicted, labels=labels, zero_division=0)
    calibration = _calibration(right, confidence)
    overall["ece"] = calibration.error
    return Scores(
        overall,
        tuple(
            LabelScores(label, float(precision), float(recall), float(f1), int(support))
            for label, precision, recall, f1, support in zip(labels, *of_labels, strict=True)
        ),
        Confusion(tuple(labels), confusion_matrix(expected, predicted, labels=labels)),
        calibration,
        right.astype(np.float64),
        "accuracy",
    )


_NAMES = ("precision", "recall", "f1")


def _calibration(right: NDArray[np.bool_], confidence: NDArray[np.float64]) -> Calibration:
    confidence = confidence.clip(0, 1)
    accuracy, mean_confidence = calibration_curve(right.astype(int), confidence, n_bins=BINS)
    # As calibration_curve puts them into bins; it returns those that are not empty, without their sizes.
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    counts = np.bincount(bins, minlength=BINS)
    counts = counts[counts > 0]
    error = float(np.average(np.abs(accuracy - mean_confidence), weights=counts))
    return Calibration(error, mean_confidence, accuracy, counts)


def _entities(examples: Sequence[Example], results: Sequence[Result]) -> Scores:
    predicted = [
        tuple(Span(one["start"], one["end"], one["label"]) for one in cast("list[dict[str, Any]]", values["entities"]))
        for values in (result.values for result in results)
    ]
    texts = [example.inputs.texts[0] for example in examples]
    # By character, so that spans count as equal when they are, whatever the words.
    expected_tags = [_tags(example.expected.spans, text) for example, text in zip(examples, texts, strict=True)]
    predicted_tags = [_tags(spans, text) for spans, text in zip(predicted, texts, strict=True)]
    report = classification_report(expected_tags, predicted_tags, output_dict=True, zero_division=0)
    overall = {
        f"{name}_{average}": float(report[f"{average} avg"][key])
        for average in ("micro", "macro")
        for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"))
    }
    exact = np.array(
        [set(example.expected.spans) == set(spans) for example, spans in zip(examples, predicted, strict=True)]
    )
    overall["texts_exactly_right"] = float(exact.mean())
    labels = tuple(
        LabelScores(label, float(one["precision"]), float(one["recall"]), float(one["f1-score"]), int(one["support"]))
        for label, one in report.items()
        if not label.endswith(" avg")
    )
    return Scores(overall, labels, None, None, exact.astype(np.float64), "texts exactly right")


def _tags(spans: Sequence[Span], text: str) -> list[str]:
    tags = ["O"] * len(text)
    for span in spans:
        tags[span.start : span.end] = [f"B-{span.label}", *[f"I-{span.label}"] * (span.end - span.start - 1)]
    return tags


def _ranked(examples: Sequence[Example], results: Sequence[Result]) -> Scores:
    gains, reciprocal_ranks = [], []
    for example, result in zip(examples, results, strict=True):
        relevance = np.array(example.expected.relevance)
        scores = np.zeros(len(relevance))
        for one in cast("list[dict[str, Any]]", result.values["documents"]):
            scores[one["index"]] = one["score"]
        # Of one document there is no order, and scikit-learn refuses it.
        gains.append(float(ndcg_score([relevance], [scores])) if len(relevance) > 1 else float(relevance[0] > 0))
        ranks = stats.rankdata(-scores, method="ordinal")[relevance > 0]
        reciprocal_ranks.append(1 / ranks.min() if len(ranks) else 0.0)
    by_example = np.array(gains)
    overall = {"ndcg": float(by_example.mean()), "mrr": float(np.mean(reciprocal_ranks))}
    return Scores(overall, (), None, None, by_example, "nDCG")
