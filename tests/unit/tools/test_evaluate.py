"""`modelfleet evaluate` in this process, against a small real service."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from harness.letters import Letters, served, serving_letters
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.runtime.errors import OverloadedError, SessionFailureError
from modelfleet_tools.__main__ import app
from modelfleet_tools.evaluate.comparison import compare
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.slow  # draws plots

LABELS = ["a", "b", "c"]


class Guessing(Letters):
    """Classifies by the first letter; the model `other` says `a` to everything."""

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        response = await super().Classify(request, context)
        for one, text in zip(response.classifications, request.texts, strict=True):
            del one.labels[:]
            first = "a" if request.model.startswith("other") else text[0]
            one.labels.add(label=first, score=0.5 + len(text) / 100)
        return response


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def letters() -> Guessing:
    return Guessing(served=[served(name, 1, aliases=["stable"], labels=LABELS) for name in ("letters", "other")])


@pytest.fixture
async def evaluate(
    letters: Guessing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """Run `evaluate letters` on rows, which are written to a file, for a task."""
    async with serving_letters(letters) as targets:
        monkeypatch.setenv("MODELFLEET_INFERENCE", targets["inference"])
        monkeypatch.chdir(tmp_path)

        async def call(task: str, rows: list[dict[str, Any]], *more: str) -> Result:
            for one in letters.served:
                one.task = getattr(pb, f"TASK_{task.upper()}")
                one.labels[:] = LABELS if task == "classify" else ["O", "B-FIRST", "I-FIRST"]
            Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return await asyncio.to_thread(
                CliRunner().invoke, app, ["evaluate", "letters", "--data", "data.jsonl", *more]
            )

        yield call


ROWS = [{"text": f"{LABELS[row % 3]}{'x' * (row % 17)}", "label": LABELS[row * row % 3]} for row in range(200)]


async def test_figures_are_those_that_scikit_learn_gives_for_the_same_predictions(evaluate: Any) -> None:
    shown = await evaluate("classify", ROWS, "--predictions", "predictions.jsonl", "--json")

    assert shown.exit_code == 0, shown.stderr
    (model,) = json.loads(shown.stdout)["models"]
    answered = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    expected, predicted = [row["label"] for row in ROWS], [row["label"] for row in answered]
    assert [row["expected"] for row in answered] == expected
    assert predicted == [row["text"][0] for row in ROWS]
    metrics = model["metrics"]
    assert metrics["accuracy"] == accuracy_score(expected, predicted)
    assert metrics["f1_macro"] == f1_score(expected, predicted, average="macro")
    assert metrics["f1_micro"] == pytest.approx(f1_score(expected, predicted, average="micro"))
    assert metrics["precision_macro"] == precision_score(expected, predicted, average="macro", zero_division=0)
    assert model["confusion"]["counts"] == confusion_matrix(expected, predicted).tolist()
    assert model["labels"][0]["f1"] == f1_score(expected, predicted, labels=["a"], average=None)[0]


async def test_a_full_queue_is_waited_for_and_counts_in_no_latency(evaluate: Any, letters: Guessing) -> None:
    full = OverloadedError("full")
    full.retry_after_s = 0.3
    turns = iter([full, None, full, full, *[None] * 1000])
    letters.fail = lambda request: next(turns) if getattr(request, "texts", None) else None

    shown = await evaluate("classify", ROWS, "--json")

    assert shown.exit_code == 0, shown.stderr
    (model,) = json.loads(shown.stdout)["models"]
    assert sum(row["support"] for row in model["labels"]) == len(ROWS)
    assert next(turns, "none left") is None
    assert model["latency"]["p50_ms"] < 300


async def test_a_service_that_fails_ends_it_in_one_sentence(evaluate: Any, letters: Guessing) -> None:
    letters.fail = lambda request: SessionFailureError("The session failed.") if getattr(request, "texts", 0) else None

    shown = await evaluate("classify", ROWS)

    assert (shown.exit_code, "Error: The session failed." in shown.stderr) == (1, True), shown.stderr
    assert not isinstance(shown.exception, ExceptionGroup)
    assert not Path("evaluation-letters.json").exists()


async def test_a_version_that_is_not_served_is_named(evaluate: Any) -> None:
    shown = await evaluate("classify", ROWS, "--compare", "letters@7")

    assert shown.exit_code == 4
    assert shown.stderr == "Error: letters@7 is not served. List what is with `modelfleet models --served`.\n"


async def test_calibration_is_how_far_confidence_is_from_accuracy(evaluate: Any) -> None:
    rows = [{"text": "a", "label": "a"}] * 3 + [{"text": "a", "label": "b"}]

    shown = await evaluate("classify", rows, "--json")

    (model,) = json.loads(shown.stdout)["models"]
    assert model["calibration"]["accuracy"] == [0.75]
    assert model["metrics"]["ece"] == pytest.approx(0.75 - 0.51)


async def test_the_page_needs_no_other_file(evaluate: Any) -> None:
    shown = await evaluate("classify", [*ROWS, {"text": "c<script>", "label": "a"}], "--compare", "other")

    assert shown.exit_code == 0, shown.stderr
    page = Path("evaluation-letters.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.replace("https://arxiv.org", "")
    assert "McNemar" in page
    assert json.loads(Path("evaluation-letters.json").read_text())["examples"] == 201
    for words in ("f1_macro", "confusion", "p99_ms", "McNemar"):
        assert words in shown.stdout


async def test_entities_count_as_right_when_label_and_both_ends_are(evaluate: Any) -> None:
    rows = [
        {"text": "abc", "entities": [{"start": 0, "end": 1, "label": "first"}]},
        {"text": "abc", "entities": [{"start": 0, "end": 2, "label": "first"}]},
        {"tokens": ["a", "b"], "tags": ["B-first", "O"]},
        {"text": "abc", "entities": []},
    ]

    shown = await evaluate("entities", rows, "--rename", "first=FIRST", "--json")

    assert shown.exit_code == 0, shown.stderr
    metrics = json.loads(shown.stdout)["models"][0]["metrics"]
    assert metrics["precision_micro"] == 2 / 4
    assert metrics["recall_micro"] == 2 / 3
    assert metrics["texts_exactly_right"] == 2 / 4


async def test_rankings_are_scored_by_gain_and_by_the_first_relevant_one(evaluate: Any) -> None:
    rows = [
        {"query": "q", "documents": ["long one", "short", "x"], "relevance": [1, 0, 0]},
        {"query": "q", "documents": ["long one", "short", "x"], "relevance": [0, 1, 0]},
    ]

    shown = await evaluate("rerank", rows, "--json", "--compare", "other")

    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["models"][0]["metrics"]["mrr"] == (1 + 1 / 2) / 2
    assert document["models"][0]["metrics"]["ndcg"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert document["comparison"]["difference"] == 0
    assert not document["comparison"]["significant"]


@pytest.mark.parametrize(
    ("task", "row", "more", "message"),
    [
        ("classify", {"text": "a", "label": "z"}, [], "labels that letters@1 does not: z. The model has a, b, c"),
        ("classify", {"text": "a"}, [], "data.jsonl, line 1: The row has no 'label'"),
        ("classify", {"text": "a", "label": "a"}, ["--rename", "z"], "no DATA=MODEL"),
        ("entities", {"text": "a", "entities": [{"start": 0, "end": 9, "label": "FIRST"}]}, [], "no entity of a text"),
        ("entities", {"text": "a", "entities": [{"start": 0, "end": 1, "label": "X"}]}, [], "does not: X"),
        ("rerank", {"query": "q", "documents": ["a"], "relevance": [1, 2]}, [], "a gain of 0 or more for each"),
        ("embed", {"text": "a", "label": "a"}, [], "classify, entities, rerank"),
        ("classify", {"text": "a", "label": "a"}, ["--data", "absent.csv"], "names no file"),
    ],
)
async def test_data_that_does_not_fit_is_refused(
    evaluate: Any, task: str, row: dict[str, Any], more: list[str], message: str
) -> None:
    shown = await evaluate(task, [row], *more)

    assert shown.exit_code == 1
    assert message in shown.stderr.replace("is not DATA", "no DATA")
    assert not Path("evaluation-letters.html").exists()


async def test_reports_that_are_there_are_left_alone(evaluate: Any) -> None:
    Path("evaluation-letters.html").write_text("mine")

    refused = await evaluate("classify", ROWS)

    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert Path("evaluation-letters.html").read_text() == "mine"
    assert (await evaluate("classify", ROWS, "--overwrite")).exit_code == 0


async def test_data_may_be_csv_with_columns_of_any_name(evaluate: Any) -> None:
    Path("data.csv").write_text("body,class\nabc,1\nbcd,0\n")

    columns = ("--text-column", "body", "--label-column", "class", "--rename", "1=a", "--rename", "0=c")
    shown = await evaluate("classify", ROWS, "--data", "data.csv", *columns, "--json")

    assert json.loads(shown.stdout)["models"][0]["metrics"]["accuracy"] == 0.5


def test_a_difference_is_significant_when_one_model_is_right_where_the_other_is_wrong() -> None:
    wrong_often, wrong_seldom = np.repeat([1.0, 0.0], 50), np.repeat([1.0, 0.0], [90, 10])

    found = compare("accuracy", wrong_seldom, wrong_often)

    assert (found.only_first, found.only_other, found.difference) == (40, 0, pytest.approx(0.4))
    assert found.significant
    assert found.low < 0.4 < found.high
    assert not compare("accuracy", wrong_often, wrong_often).significant
