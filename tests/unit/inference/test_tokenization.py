import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfleet.inference.tokenization import Tokenization, TokenizeOptions, Truncation
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime import telemetry
from modelfleet.runtime.errors import DeadlineExpiredError, InvalidInputError, TokenizerUnreachableError

OPTIONS = TokenizeOptions("d" * 64, max_tokens=8)
NEVER = math.inf


class Characters:
    """A tokenizer service of which each character is a token; a window holds at most `max_tokens` of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[TokenizeOptions, list[str], list[str]]] = []
        self.timeouts: list[float] = []
        self.request_ids: list[str] = []
        self.called = asyncio.Queue[None]()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails: Callable[[Sequence[str]], Exception | None] = lambda _: None

    async def tokenize(
        self, options: TokenizeOptions, texts: Sequence[str], pairs: Sequence[str], timeout_s: float
    ) -> Tokens:
        self.calls.append((options, list(texts), list(pairs)))
        self.timeouts.append(timeout_s)
        self.request_ids.append(telemetry.request_id.get())
        self.called.put_nowait(None)
        await self.may_answer.wait()
        if error := self.fails(texts):
            raise error
        return windows(options.max_tokens, texts)


def windows(max_tokens: int, texts: Sequence[str]) -> Tokens:
    parts = [[text[at : at + max_tokens] for at in range(0, len(text), max_tokens)] or [""] for text in texts]
    flat = [window for part in parts for window in part]
    ids = np.array([ord(character) for window in flat for character in window], np.int32)
    return Tokens(
        ids=ids,
        lengths=np.array([len(window) for window in flat], np.int32),
        type_ids=(ids % 2).astype(np.uint8),
        offsets=np.stack([ids, ids + 1], axis=1),
        window_counts=np.array([len(part) for part in parts], np.int32),
        token_counts=np.array([len(text) for text in texts], np.int32),
    )


def refused_by_name(texts: Sequence[str]) -> InvalidInputError | None:
    if "bad" not in texts:
        return None
    where = f"texts[{texts.index('bad')}]"
    return InvalidInputError(f"{where} is bad", field=where)


def refused_as_a_whole(texts: Sequence[str]) -> InvalidInputError | None:
    return InvalidInputError("one of the texts is bad", field="texts") if "bad" in texts else None


def equal(one: Tokens, other: Tokens) -> bool:
    fields = ("ids", "lengths", "type_ids", "offsets", "window_counts", "token_counts")
    return all(np.array_equal(getattr(one, field), getattr(other, field)) for field in fields)


def ask(
    tokenization: Tokenization,
    *texts: str,
    options: TokenizeOptions = OPTIONS,
    deadline: float = NEVER,
    pairs: Sequence[str] = (),
) -> "asyncio.Task[Tokens]":
    return asyncio.create_task(tokenization.tokenize(options, texts, deadline=deadline, pairs=pairs))


async def in_flight(tokenizer: Characters, tokenization: Tokenization) -> "asyncio.Task[Tokens]":
    """Start a call that does not come back before `may_answer` is set."""
    tokenizer.may_answer.clear()
    first = ask(tokenization, "first")
    await tokenizer.called.get()
    return first


async def settled(tokenizer: Characters, *asked: Awaitable[Tokens]) -> list[Tokens | BaseException]:
    tokenizer.may_answer.set()
    return await asyncio.gather(*asked, return_exceptions=True)


async def test_when_idle_nothing_waits() -> None:
    tokenizer = Characters()
    assert equal(await ask(Tokenization(tokenizer), "ab", "c"), windows(8, ["ab", "c"]))
    assert tokenizer.calls == [(OPTIONS, ["ab", "c"], [])]


async def test_requests_that_arrive_while_a_call_is_in_flight_leave_together() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    asked = [await in_flight(tokenizer, tokenization), ask(tokenization, "a", "bc"), ask(tokenization, "d")]
    answers = await settled(tokenizer, *asked)
    assert [texts for _, texts, _ in tokenizer.calls] == [["first"], ["a", "bc", "d"]]
    assert equal(answers[1], windows(8, ["a", "bc"]))
    assert equal(answers[2], windows(8, ["d"]))


@given(
    requests=st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=4), min_size=1, max_size=8),
    max_characters=st.integers(1, 60),
)
@settings(deadline=None)
async def test_everyone_gets_their_own_windows_in_order(requests: list[list[str]], max_characters: int) -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer, max_characters)
    asked = [await in_flight(tokenizer, tokenization), *(ask(tokenization, *texts) for texts in requests)]
    _, *answers = await settled(tokenizer, *asked)
    for texts, answer in zip(requests, answers, strict=True):
        assert equal(answer, windows(8, texts))
    for _, texts, _ in tokenizer.calls:
        assert sum(map(len, texts)) <= max_characters or texts in [["first"], *requests]


@pytest.mark.parametrize(
    "other",
    [
        TokenizeOptions("e" * 64, max_tokens=8),
        TokenizeOptions("d" * 64, max_tokens=9),
        TokenizeOptions("d" * 64, max_tokens=8, truncation=Truncation.LEFT),
        TokenizeOptions("d" * 64, max_tokens=8, stride=0),
        TokenizeOptions("d" * 64, max_tokens=8, with_offsets=True),
    ],
)
async def test_requests_with_other_options_neither_share_a_call_nor_wait_for_it(other: TokenizeOptions) -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    first = await in_flight(tokenizer, tokenization)
    second = ask(tokenization, "second", options=other)
    await tokenizer.called.get()  # although the first is still in flight
    await settled(tokenizer, first, second)
    assert tokenizer.calls == [(OPTIONS, ["first"], []), (other, ["second"], [])]


async def test_pairs_and_single_texts_do_not_share_a_call() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    asked = [
        await in_flight(tokenizer, tokenization),
        ask(tokenization, "q", pairs=["d"]),
        ask(tokenization, "r", pairs=["e"]),
        ask(tokenization, "text"),
    ]
    await settled(tokenizer, *asked)
    assert [(texts, pairs) for _, texts, pairs in tokenizer.calls[1:]] == [(["q", "r"], ["d", "e"]), (["text"], [])]


async def test_a_large_request_holds_up_nobody() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer, max_characters=10)
    tokenizer.may_answer.clear()
    large = ask(tokenization, "x" * 11)
    await tokenizer.called.get()
    small = ask(tokenization, "small")
    await tokenizer.called.get()  # although the large one is still in flight
    await settled(tokenizer, large, small)
    assert equal(await large, windows(8, ["x" * 11]))
    assert equal(await small, windows(8, ["small"]))


async def test_what_fills_a_call_of_its_own_leaves_while_others_are_in_flight() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer, max_characters=10)
    asked = [await in_flight(tokenizer, tokenization), ask(tokenization, "a" * 6), ask(tokenization, "b" * 6)]
    await tokenizer.called.get()  # although the first is still in flight
    assert [texts for _, texts, _ in tokenizer.calls] == [["first"], ["a" * 6]]
    await settled(tokenizer, *asked)
    assert [texts for _, texts, _ in tokenizer.calls] == [["first"], ["a" * 6], ["b" * 6]]


async def test_calls_in_flight_at_once_are_bounded() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer, max_characters=10)
    texts = ["x" * 9] * 50
    asked = [await in_flight(tokenizer, tokenization), *(ask(tokenization, text) for text in texts)]
    for _ in range(3):
        await tokenizer.called.get()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(tokenizer.calls) == 4
    answers = await settled(tokenizer, *asked)
    assert all(equal(answer, windows(8, [text])) for text, answer in zip(texts, answers[1:], strict=True))


async def test_a_bad_request_fails_alone() -> None:
    tokenizer = Characters()
    tokenizer.fails = lambda texts: (
        InvalidInputError(f"texts[{texts.index('bad')}] is bad", field="texts") if "bad" in texts else None
    )
    tokenization = Tokenization(tokenizer)
    first = await in_flight(tokenizer, tokenization)
    asked = [ask(tokenization, "a"), ask(tokenization, "good", "bad"), ask(tokenization, "b")]
    answers = await settled(tokenizer, first, *asked)
    assert equal(answers[1], windows(8, ["a"]))
    assert isinstance(answers[2], InvalidInputError)
    assert answers[2].message == "texts[1] is bad"  # its own index, not that in the shared call
    assert equal(answers[3], windows(8, ["b"]))


async def test_a_bad_request_costs_the_others_one_call_more_whatever_their_number() -> None:
    tokenizer = Characters()
    tokenizer.fails = refused_by_name
    tokenization = Tokenization(tokenizer)
    texts = [*map(str, range(40)), "bad", *map(str, range(40))]
    asked = [await in_flight(tokenizer, tokenization), *(ask(tokenization, text) for text in texts)]
    _, *answers = await settled(tokenizer, *asked)
    assert [isinstance(answer, InvalidInputError) for answer in answers] == [text == "bad" for text in texts]
    assert [texts for _, texts, _ in tokenizer.calls[2:]] == [["bad"], texts[:40], texts[41:]]


@given(
    requests=st.lists(st.lists(st.sampled_from(["good", "bad"]), min_size=1, max_size=3), min_size=2, max_size=32),
    named=st.booleans(),
)
@settings(deadline=None)
async def test_all_bad_requests_fail_and_no_other_in_few_calls(requests: list[list[str]], named: bool) -> None:
    tokenizer = Characters()
    tokenizer.fails = refused_by_name if named else refused_as_a_whole
    tokenization = Tokenization(tokenizer)
    asked = [await in_flight(tokenizer, tokenization), *(ask(tokenization, *texts) for texts in requests)]
    _, *answers = await settled(tokenizer, *asked)
    for texts, answer in zip(requests, answers, strict=True):
        if "bad" in texts:
            assert isinstance(answer, InvalidInputError)
            assert not named or answer.field == f"texts[{texts.index('bad')}]"
        else:
            assert isinstance(answer, Tokens)
            assert equal(answer, windows(8, texts))
    bad = sum("bad" in texts for texts in requests)
    assert len(tokenizer.calls) <= 2 + 3 * bad * (1 + math.ceil(math.log2(len(requests))))


async def test_a_limit_that_only_the_shared_call_exceeds_fails_nobody() -> None:
    tokenizer = Characters()
    tokenizer.fails = lambda texts: InvalidInputError("too many", field="texts") if len(texts) > 3 else None
    tokenization = Tokenization(tokenizer)
    asked = [await in_flight(tokenizer, tokenization), *(ask(tokenization, text) for text in "abcdefg")]
    _, *answers = await settled(tokenizer, *asked)
    assert all(isinstance(answer, Tokens) for answer in answers)


async def test_what_is_no_ones_fault_fails_all_of_a_call_and_no_later_one() -> None:
    tokenizer = Characters()
    tokenizer.fails = lambda _: TokenizerUnreachableError("gone")
    tokenization = Tokenization(tokenizer)
    asked = [await in_flight(tokenizer, tokenization), ask(tokenization, "a"), ask(tokenization, "b")]
    assert [type(answer) for answer in await settled(tokenizer, *asked)] == [TokenizerUnreachableError] * 3
    assert len(tokenizer.calls) == 2
    tokenizer.fails = lambda _: None
    assert equal(await ask(tokenization, "c"), windows(8, ["c"]))


async def test_an_unforeseen_failure_leaves_nobody_waiting() -> None:
    tokenizer = Characters()
    tokenizer.fails = lambda texts: ValueError("unforeseen") if "first" in texts else None
    tokenization = Tokenization(tokenizer)
    first, second = await in_flight(tokenizer, tokenization), ask(tokenization, "a")
    answers = await settled(tokenizer, first, second)
    assert isinstance(answers[0], ValueError)
    assert equal(answers[1], windows(8, ["a"]))


async def test_a_caller_that_left_is_not_sent_and_disturbs_nobody() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    first, leaving, staying = (
        await in_flight(tokenizer, tokenization),
        ask(tokenization, "leaving"),
        ask(tokenization, "staying"),
    )
    await asyncio.sleep(0)  # both wait
    first.cancel()
    leaving.cancel()
    await settled(tokenizer, first, leaving, staying)
    assert equal(await staying, windows(8, ["staying"]))
    assert [texts for _, texts, _ in tokenizer.calls] == [["first"], ["staying"]]


async def test_a_request_past_its_deadline_is_not_sent() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    with pytest.raises(DeadlineExpiredError, match="before the text was tokenized"):
        await ask(tokenization, "late", deadline=time.monotonic() - 1)
    assert tokenizer.calls == []


async def test_a_call_may_last_as_long_as_its_most_patient_caller() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    first = await in_flight(tokenizer, tokenization)
    now = time.monotonic()
    asked = [ask(tokenization, "a", deadline=now + 50), ask(tokenization, "b", deadline=now + 90)]
    await settled(tokenizer, first, *asked)
    assert tokenizer.timeouts[0] == math.inf
    assert 50 < tokenizer.timeouts[1] <= 90


async def test_a_shared_call_carries_the_ids_of_its_requests() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)

    async def identified(name: str) -> Tokens:
        telemetry.request_id.set(name)
        answer = await tokenization.tokenize(OPTIONS, [name], deadline=NEVER)
        assert telemetry.request_id.get() == name  # the call's is its own
        return answer

    first = await in_flight(tokenizer, tokenization)
    await settled(tokenizer, first, *(asyncio.create_task(identified(name)) for name in ("one", "two")))
    assert tokenizer.request_ids[1] == "one,two"


async def test_the_joined_ids_are_as_long_as_one_may_be() -> None:
    tokenizer = Characters()
    tokenization = Tokenization(tokenizer)
    asked = [await in_flight(tokenizer, tokenization)]
    for letter in "abcd":
        telemetry.request_id.set(letter * 300)
        asked.append(ask(tokenization, letter))
    await settled(tokenizer, *asked)
    assert tokenizer.request_ids[1] == "a" * 300 + "," + "b" * 211
