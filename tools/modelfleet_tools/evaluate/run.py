"""Data read, models asked, answers scored and compared."""

import asyncio
from dataclasses import dataclass

from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import WrongTaskError

from modelfleet_tools.batch.formats import JsonLines
from modelfleet_tools.batch.tasks import Options
from modelfleet_tools.evaluate.asking import ask_all
from modelfleet_tools.evaluate.comparison import compare
from modelfleet_tools.evaluate.examples import LABEL_COLUMNS, Data, Example, check_labels, read_examples
from modelfleet_tools.evaluate.report import Evaluation, ModelReport
from modelfleet_tools.evaluate.scores import score
from modelfleet_tools.named_version import named_version


@dataclass(frozen=True, slots=True)
class Settings:
    """What to evaluate: one model, or two to compare."""

    models: tuple[str, ...]
    data: Data
    options: Options
    callers: int
    texts_per_request: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """The evaluation, and the examples that it is of."""

    evaluation: Evaluation
    examples: tuple[Example, ...]


async def evaluate(client: AsyncClient, settings: Settings) -> Found:
    """Evaluate. Raises WrongTaskError for models that cannot be, InvalidInputError for data that does not fit."""
    served = [await named_version(client, model) for model in settings.models]
    names = [f"{one.model}@{one.model_version}" for one in served]
    task = served[0].task
    for name, one in zip(names, served, strict=True):
        if one.task not in LABEL_COLUMNS:
            raise WrongTaskError(
                f"{name} is a model of the task {one.task!r}. Evaluated are {', '.join(LABEL_COLUMNS)}."
            )
        if one.task != task:
            raise WrongTaskError(f"{name} is a model of the task {one.task!r}, {names[0]} of {task!r}.")
    examples = await asyncio.to_thread(read_examples, settings.data, task)
    for name, one in zip(names, served, strict=True):
        check_labels(task, examples, name, one.labels)
    texts_per_request = 1 if task == "rerank" else settings.texts_per_request
    reports = []
    for name in names:
        answers = await ask_all(
            client,
            name,
            task,
            examples,
            settings.options,
            callers=settings.callers,
            texts_per_request=texts_per_request,
            timeout_s=settings.timeout_s,
        )
        scores = score(task, examples, answers.results)
        reports.append(ModelReport(name, scores, answers, texts_per_request, settings.callers))
    first = reports[0].scores
    comparison = None
    if reports[1:]:
        comparison = compare(first.by_example_name, first.by_example, reports[1].scores.by_example)
    return Found(Evaluation(task, settings.data.url, len(examples), tuple(reports), comparison), tuple(examples))


def predictions(found: Found) -> bytes:
    """Return JSONL: what the first model answered to each example, beside what it should have."""
    records = [
        {
            "place": example.place,
            "expected": example.expected.label
            or [{"start": span.start, "end": span.end, "label": span.label} for span in example.expected.spans]
            or list(example.expected.relevance),
            **result.values,
        }
        for example, result in zip(found.examples, found.evaluation.models[0].answers.results, strict=True)
    ]
    return JsonLines().chunk(records, first=True)
