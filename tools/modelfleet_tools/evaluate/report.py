"""An evaluation as tables for a terminal, as JSON, and as one HTML page that needs no other file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from modelfleet_tools.evaluate import plots
from modelfleet_tools.evaluate.asking import Answers
from modelfleet_tools.evaluate.comparison import Comparison
from modelfleet_tools.evaluate.scores import Scores

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model on the data. `texts_per_request` and `callers` are what the latencies belong to."""

    model: str
    scores: Scores
    answers: Answers
    texts_per_request: int
    callers: int

    @property
    def latency(self) -> dict[str, float]:
        """Milliseconds a request by percentile, and examples a second."""
        values = np.percentile(1000 * self.answers.latencies_s, _PERCENTILES)
        return {
            **{f"p{rank}_ms": round(float(value), 3) for rank, value in zip(_PERCENTILES, values, strict=True)},
            "examples_per_s": round(len(self.answers.results) / self.answers.seconds, 1),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was found. `models` are one or two; `comparison` is there for two."""

    task: str
    data: str
    examples: int
    models: tuple[ModelReport, ...]
    comparison: Comparison | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield the tables, the most wanted first."""
    models = evaluation.models
    names = tuple(one.model for one in models)
    overall = [(name, *(one.scores.overall[name] for one in models)) for name in models[0].scores.overall]
    yield Table(
        f"{evaluation.task} on {evaluation.data.rpartition('/')[2]}: {evaluation.examples} examples",
        ("metric", *names),
        tuple(overall),
    )
    if evaluation.comparison:
        yield _comparison_table(evaluation.comparison, names)
    for one in models:
        if one.scores.labels:
            rows = tuple((row.label, row.precision, row.recall, row.f1, row.support) for row in one.scores.labels)
            yield Table(f"{one.model}: labels", ("label", "precision", "recall", "F1", "examples"), rows)
        if one.scores.confusion:
            labels = one.scores.confusion.labels
            counts = one.scores.confusion.counts.tolist()
            cells = tuple((label, *row) for label, row in zip(labels, counts, strict=True))
            yield Table(f"{one.model}: confusion, predicted across", ("expected", *labels), cells)
    title = f"Latency: {models[0].texts_per_request} examples a request, {models[0].callers} callers"
    latencies = [(name, *(one.latency[name] for one in models)) for name in models[0].latency]
    yield Table(title, ("", *names), tuple(latencies))


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return what programs read."""
    return {
        "task": evaluation.task,
        "data": evaluation.data,
        "examples": evaluation.examples,
        "models": [_model_json(one) for one in evaluation.models],
        "comparison": evaluation.comparison
        and {**_fields(evaluation.comparison), "significant": _significant(evaluation)},
    }


def as_html(evaluation: Evaluation) -> str:
    """Return the page."""
    environment = Environment(loader=PackageLoader("modelfleet_tools.evaluate", "."), autoescape=select_autoescape())
    template = environment.get_template("report.html.j2")
    pictures = [(one.model, [plots.data_url(figure) for figure in _figures(one)]) for one in evaluation.models]
    document = json.dumps(as_json(evaluation), indent=2, ensure_ascii=False)
    return template.render(tables=list(tables(evaluation)), pictures=pictures, document=document)


def _comparison_table(found: Comparison, names: Sequence[str]) -> Table:
    verdict = "significant at 5%" if found.significant else "may be chance"
    rows: list[tuple[object, ...]] = [
        (f"{found.metric} of {names[0]} minus {names[1]}", f"{found.difference:+.4f}"),
        ("95% interval (paired bootstrap)", f"{found.low:+.4f} to {found.high:+.4f}"),
        (f"p ({found.test})", f"{found.p_value:.4g}, {verdict}"),
    ]
    if found.only_first is not None:
        rows.append(("right by one alone", f"{names[0]} {found.only_first}, {names[1]} {found.only_other}"))
    return Table("Comparison", ("", ""), tuple(rows))


def _significant(evaluation: Evaluation) -> bool | None:
    return evaluation.comparison.significant if evaluation.comparison else None


def _fields(found: Comparison) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Comparison.__slots__}


def _model_json(one: ModelReport) -> dict[str, Any]:
    scores = one.scores
    return {
        "model": one.model,
        "metrics": scores.overall,
        "labels": [{name: getattr(row, name) for name in type(row).__slots__} for row in scores.labels],
        "confusion": scores.confusion
        and {"labels": list(scores.confusion.labels), "counts": scores.confusion.counts.tolist()},
        "calibration": scores.calibration
        and {
            "ece": scores.calibration.error,
            "confidence": scores.calibration.confidence.tolist(),
            "accuracy": scores.calibration.accuracy.tolist(),
            "counts": scores.calibration.counts.tolist(),
        },
        "latency": {"texts_per_request": one.texts_per_request, "callers": one.callers, **one.latency},
    }


def _figures(one: ModelReport) -> Iterator[Figure]:
    scores = one.scores
    if scores.confusion and (figure := plots.confusion_plot(scores.confusion)):
        yield figure
    if scores.calibration:
        yield plots.reliability_plot(scores.calibration)
    if scores.labels:
        yield plots.label_plot(scores.labels)
    yield plots.latency_plot(one.answers.latencies_s)
