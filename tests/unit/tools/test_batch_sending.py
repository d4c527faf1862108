"""What is sent together, how many at once, and which rows are given up."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    InvalidInputError,
    ModelNotFoundError,
    NotFiniteError,
    OverloadedError,
    SessionFailureError,
    WrongTaskError,
)
from modelfleet_tools.batch import sending
from modelfleet_tools.batch.concurrency import AdaptiveConcurrency
from modelfleet_tools.batch.filling import Failed, Portion, Row, TokenEstimate, fill
from modelfleet_tools.batch.sending import Answered, Sender, in_order
from modelfleet_tools.batch.tasks import Inputs, Result


def row(number: int, text: str = "text") -> Row:
    return Row(number, f"line {number}", Inputs((text,)), {})


def failed(number: int) -> Failed:
    return Failed(number, f"line {number}", "INVALID_INPUT", "broken")


async def blocks(rows: Sequence[Row | Failed], size: int = 7) -> AsyncIterator[Sequence[Row | Failed]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@given(
    lengths=st.lists(st.one_of(st.none(), st.integers(0, 400)), max_size=120),
    tokens=st.integers(1, 300),
    most=st.integers(1, 40),
)
async def test_portions_have_every_row_once_in_order_within_their_budget(
    lengths: list[int | None], tokens: int, most: int
) -> None:
    rows = [failed(n) if length is None else row(n, "x" * length) for n, length in enumerate(lengths)]
    estimate = TokenEstimate()

    portions = [portion async for portion in fill(blocks(rows), estimate, tokens, most)]

    assert list(chain.from_iterable(portions)) == rows
    for portion in portions:
        sent = [one for one in portion if isinstance(one, Row)]
        assert len(sent) <= most
        assert len(sent) <= 1 or sum(estimate.of(one.inputs) for one in sent) <= tokens


def test_the_estimate_follows_what_the_service_reports() -> None:
    estimate = TokenEstimate()
    for _ in range(20):
        estimate.learn(1000, 900)

    assert estimate.of(Inputs(("x" * 1000,))) == pytest.approx(903, rel=0.05)


async def test_concurrency_rises_by_one_a_round_and_halves_once_for_those_refused_together() -> None:
    concurrency = AdaptiveConcurrency(32)
    async with concurrency.slot() as first, concurrency.slot() as second:
        assert concurrency.limit == 4
        for _ in range(5):
            concurrency.succeeded()
        assert concurrency.limit == 5
        concurrency.refused(first)
        concurrency.refused(second)
        assert concurrency.limit == 2
    async with concurrency.slot() as third:
        for _ in range(10):
            concurrency.refused(third)
    assert concurrency.limit == 1
    for _ in range(5000):
        concurrency.succeeded()
    assert concurrency.limit == 32


async def test_no_more_requests_are_under_way_than_allowed() -> None:
    concurrency = AdaptiveConcurrency(3)

    async def one() -> None:
        async with concurrency.slot():
            await asyncio.sleep(0)

    await asyncio.gather(*(one() for _ in range(50)))

    assert concurrency.highest == 3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_pause_s", lambda *_: 0.001)


def sender(answer: "Answers", patience_s: float = 5.0) -> Sender:
    return Sender(answer.ask, AdaptiveConcurrency(4), TokenEstimate(), patience_s)


class Answers:
    """Answers with as many tokens as characters, but fails on requests that have one of the texts of `poison`."""

    def __init__(self, **poison: Exception) -> None:
        self.poison = poison
        self.alone: dict[str, Exception] = {}
        self.asked: list[list[str]] = []

    async def ask(self, inputs: Sequence[Inputs]) -> list[Result]:
        texts = [one.texts[0] for one in inputs]
        self.asked.append(texts)
        await asyncio.sleep(0)
        for text in texts:
            if text in self.poison:
                raise self.alone.get(text, self.poison[text]) if len(texts) == 1 else self.poison[text]
        return [Result({}, len(text), truncated=False) for text in texts]


@pytest.mark.parametrize(
    "error", [SessionFailureError("crash"), DeadlineExpiredError("slow"), InvalidInputError("bad")]
)
async def test_a_row_that_always_fails_is_given_up_alone_while_others_are_answered(error: Exception) -> None:
    answers = Answers(bad=error)
    one = sender(answers)
    stop = asyncio.Event()

    async def others() -> None:
        while not stop.is_set():
            await one.send((row(99),))

    busy = asyncio.create_task(others())
    outcomes = await one.send((row(0), row(1), failed(2), row(3, "bad"), row(4)))
    stop.set()
    await busy

    assert [type(outcome) for outcome in outcomes] == [Answered, Answered, Failed, Failed, Answered]
    assert outcomes[3].message == error.args[0]


async def test_a_row_that_the_error_names_costs_no_search() -> None:
    answers = Answers(bad=InvalidInputError("bad", field="texts[5]"))

    outcomes = await sender(answers).send(tuple(row(n, "bad" if n == 5 else "text") for n in range(64)))

    assert [isinstance(outcome, Failed) for outcome in outcomes] == [n == 5 for n in range(64)]
    assert [len(texts) for texts in answers.asked] == [64, 63, 1]


@pytest.mark.parametrize("rows", [1, 3])
async def test_a_small_job_with_a_row_that_the_model_cannot_answer_is_answered_but_for_that_row(rows: int) -> None:
    # Nothing else is answered meanwhile, by which the service would be known to be well.
    answers = Answers(bad=NotFiniteError("NaN", field=f"texts[{rows - 1}]"))
    answers.alone = {"bad": NotFiniteError("NaN", field="texts[0]")}

    outcomes = await sender(answers).send(tuple(row(n, "bad" if n == rows - 1 else "text") for n in range(rows)))

    assert [type(outcome) for outcome in outcomes] == [Answered] * (rows - 1) + [Failed]
    assert outcomes[-1].reason == "NOT_FINITE"


async def test_all_rows_that_an_error_names_are_set_apart_at_once() -> None:
    found = InvalidInputError("bad", fields=["texts[1]", "texts[4]"])
    answers = Answers(bad=found)
    answers.alone = {"bad": InvalidInputError("bad", field="texts[0]")}

    outcomes = await sender(answers).send(tuple(row(n, "bad" if n in {1, 4} else "text") for n in range(6)))

    assert [isinstance(outcome, Failed) for outcome in outcomes] == [n in {1, 4} for n in range(6)]
    assert [len(texts) for texts in answers.asked] == [6, 4, 1, 1]


@pytest.mark.parametrize(
    ("error", "patience_s"),
    [
        (WrongTaskError("task"), 60),
        (InvalidInputError("too many", field="dimensions"), 60),
        (OverloadedError("full"), 0),
        (ModelNotFoundError("no"), 0),
    ],
)
async def test_what_no_row_can_help_ends_the_run(error: Exception, patience_s: float) -> None:
    with pytest.raises(type(error)):
        await sender(Answers(text=error), patience_s).send((row(0),))


@given(delays=st.lists(st.integers(0, 5), max_size=60))
async def test_outcomes_come_in_order_whatever_is_answered_first(delays: list[int]) -> None:
    async def portions() -> AsyncIterator[Portion]:
        for number in range(len(delays)):
            yield (row(number),)

    async def send(portion: Portion) -> list[Answered | Failed]:
        for _ in range(delays[portion[0].number]):
            await asyncio.sleep(0)
        return [failed(one.number) for one in portion]

    found = [outcome async for outcomes in in_order(portions(), send) for outcome in outcomes]

    assert found == [failed(number) for number in range(len(delays))]


async def test_only_so_many_rows_are_read_ahead_of_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST_ROWS", 10)
    slowest = asyncio.Event()
    started: list[int] = []

    async def portions() -> AsyncIterator[Portion]:
        for number in range(100):
            yield (row(number),)

    async def send(portion: Portion) -> list[Answered | Failed]:
        started.append(portion[0].number)
        if portion[0].number == 0:
            await slowest.wait()
        return [failed(portion[0].number)]

    async def consume() -> int:
        return len([outcomes async for outcomes in in_order(portions(), send)])

    consumer = asyncio.create_task(consume())
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(started) == 10
    slowest.set()

    assert await consumer == 100
