"""`modelfleet bench`: the loads, and the command against a small real service."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from harness.letters import Letters, served, serving_letters
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.runtime.errors import OverloadedError
from modelfleet_tools.__main__ import app
from modelfleet_tools.batch.tasks import Inputs, Result
from modelfleet_tools.bench.load import ClosedLoop, OpenLoop, apply_load, arrivals
from modelfleet_tools.bench.texts import requests_of
from typer.testing import CliRunner
from typer.testing import Result as Shown

QUESTION = [[Inputs(("text",))]]


@given(rate=st.floats(0.5, 2000), seconds=st.floats(0.1, 5))
def test_arrivals_are_in_time_and_as_many_as_asked_for(rate: float, seconds: float) -> None:
    due = arrivals(rate, seconds)

    assert (np.diff(due) >= 0).all()
    assert (due[1:] < seconds).all()
    assert abs(len(due) - rate * seconds) < 5 * np.sqrt(rate * seconds) + 5


async def test_a_stall_counts_for_every_request_that_was_due_in_it() -> None:
    sent = 0

    async def ask(inputs: Sequence[Inputs]) -> list[Result]:
        nonlocal sent
        sent += 1
        if sent == 10:
            time.sleep(0.4)  # noqa: ASYNC251  nothing is sent meanwhile, which is the point
        return [Result({}, 1, truncated=False) for _ in inputs]

    measured = await apply_load(ask, QUESTION, OpenLoop(100), 1.0)

    assert len(measured.latencies_s) == len(arrivals(100, 1.0))
    assert sum(latency > 0.1 for latency in measured.latencies_s) >= 15
    assert max(measured.lags_s) > 0.3


async def test_callers_of_a_closed_loop_each_have_one_request_under_way() -> None:
    under_way = most = 0

    async def ask(_: Sequence[Inputs]) -> list[Result]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return [Result({}, 3, truncated=False)]

    measured = await apply_load(ask, QUESTION, ClosedLoop(5), 0.2)

    assert most == 5
    assert measured.tokens == 3 * measured.texts == 3 * len(measured.latencies_s)


def test_requests_have_as_many_texts_as_asked_for_and_rerank_a_query() -> None:
    texts = list("abcdefg")

    assert [[one.texts for one in request] for request in requests_of(texts, "embed", 3)] == [
        [("a",), ("b",), ("c",)],
        [("d",), ("e",), ("f",)],
    ]
    assert requests_of(texts, "rerank", 2)[1] == [Inputs(("e", "f"), "d")]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def letters() -> Letters:
    return Letters(served=[served("letters", 1, aliases=["stable"])])


@pytest.fixture
async def bench(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    async with serving_letters(letters) as targets:
        monkeypatch.setenv("MODELFLEET_INFERENCE", targets["inference"])

        async def call(*arguments: object) -> Shown:
            command = ["bench", "letters", "--warmup", "0", "--duration", "0.2", *map(str, arguments)]
            return await asyncio.to_thread(CliRunner().invoke, app, command)

        yield call


async def test_a_sweep_is_a_table_a_plot_and_a_picture(bench: Any, tmp_path: Path) -> None:
    shown = await bench("--callers", "1,2", "--plot", tmp_path / "sweep.png")

    assert shown.exit_code == 0, shown.stderr
    for words in ("embed by letters@1", "1 caller ", "2 callers", "p99.9", "Legend", "texts/s"):
        assert words in shown.stdout
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


async def test_json_has_a_row_for_each_rate(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("abc\nabcde\n")

    shown = await bench("--rate", "50,100", "--texts", tmp_path / "texts.txt", "--texts-per-request", "2", "--json")

    document = json.loads(shown.stdout)
    assert (shown.exit_code, document["model"]) == (0, "letters@1")
    assert [row["offered_per_s"] for row in document["rows"]] == [50, 100]
    for row in document["rows"]:
        assert row["requests"] == len(arrivals(row["offered_per_s"], 0.2))
        assert row["tokens_per_s"] == pytest.approx(4 * row["texts_per_s"], rel=0.01)
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]


async def test_errors_are_counted_by_reason(bench: Any, letters: Letters) -> None:
    turns = iter([OverloadedError("full"), None] * 10_000)
    letters.fail = lambda request: next(turns) if hasattr(request, "texts") else None

    shown = await bench("--rate", "100", "--json")

    (row,) = json.loads(shown.stdout)["rows"]
    assert shown.exit_code == 0
    assert row["errors"] == {"OVERLOADED": row["failed"]}
    assert abs(row["requests"] - 2 * row["failed"]) <= 1


async def test_a_load_that_nobody_answers_ends_with_3(bench: Any, letters: Letters) -> None:
    letters.fail = lambda request: OverloadedError("full") if hasattr(request, "texts") else None

    shown = await bench("--callers", "1")

    assert shown.exit_code == 3
    assert "OVERLOADED" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rate", "1", "--callers", "1"], 2, "not both"),
        (["--rate", "0"], 2, "no list of positive numbers"),
        (["--callers", "many"], 2, "no list of positive numbers"),
        (["--texts", "/absent.txt"], 2, "does not exist"),
    ],
)
async def test_wrong_usage_says_what_is_wrong(bench: Any, arguments: list[str], code: int, message: str) -> None:
    shown = await bench(*arguments)

    assert shown.exit_code == code
    assert message in shown.stderr


async def test_a_model_of_another_kind_is_refused(bench: Any, letters: Letters) -> None:
    letters.served[0].task = pb.TASK_TENSOR

    shown = await bench()

    assert shown.exit_code == 1
    assert "embed, classify, entities, rerank" in shown.stderr
