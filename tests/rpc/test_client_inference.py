"""What clients send to the inference service, and what they make of its answers."""

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
from harness.callers import Caller
from harness.letters import Letters, probability, served, serving_letters
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.client import AsyncClient, Client
from modelfleet.client.splitting import MAX_ITEMS
from modelfleet.client.steps import AT_ONCE
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    DrainingError,
    InvalidInputError,
    ModelfleetError,
    ModelNotFoundError,
    NotServedHereError,
    OverloadedError,
    StateConflictError,
    UnavailableError,
    UnknownCallError,
)

FAILED = version_state_pb2.VERSION_STATE_FAILED
WARMING = version_state_pb2.VERSION_STATE_WARMING


@pytest.fixture(params=[False, True], ids=["threads", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
async def targets(letters: Letters) -> AsyncIterator[dict[str, str]]:
    async with serving_letters(letters) as targets:
        yield targets


async def test_vectors_come_as_float32_with_the_version_that_answered(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.model_version = 7

    answer = await call(targets, "embed", "letters", ["a", "four"])

    assert answer.vectors.dtype == np.float32
    assert answer.vectors.tolist() == [[1, 1], [4, 1]]
    assert [usage.token_count for usage in answer.usage] == [1, 4]
    assert (answer.model, answer.model_version) == ("letters", 7)


async def test_options_reach_the_service(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    options = {"normalize": False, "dimensions": 64, "truncation": "left", "window_stride": 0}

    await call(targets, "embed", "letters@canary", ["a"], **options)
    await call(targets, "embed", "letters", ["a"])

    told, untold = letters.requests
    assert (told.model, told.normalize, told.dimensions) == ("letters@canary", False, 64)
    assert told.truncation == tokenizer_pb2.TRUNCATION_LEFT
    assert told.HasField("windowing")
    assert not untold.HasField("normalize")
    assert not untold.HasField("windowing")


async def test_token_ids_go_in_place_of_texts(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    answer = await call(targets, "embed", "letters", token_ids=[[101, 7, 102], np.array([101, 102])])

    assert answer.vectors[:, 0].tolist() == [3, 2]
    assert letters.requests[0].token_ids.ids == np.array([101, 7, 102, 101, 102], "<i4").tobytes()


async def test_more_texts_than_fit_a_message_come_back_in_their_order(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    texts = ["x" * (1 + index % 50) for index in range(5 * MAX_ITEMS + 1)]

    answer = await call(targets, "embed", "letters", texts)

    assert answer.vectors[:, 0].tolist() == [len(text) for text in texts]
    assert len(answer.usage) == len(texts)
    assert len(letters.requests) == 6


async def test_an_alias_that_moves_meanwhile_does_not_mix_versions(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.model_version = 3

    await call(targets, "classify", "letters", ["x"] * (2 * MAX_ITEMS + 1))

    assert [request.model for request in letters.requests] == ["letters", "letters@3", "letters@3"]


async def test_a_batch_whose_version_is_unloaded_meanwhile_is_sent_anew(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    def moved(request: pb.RerankRequest) -> NotServedHereError | None:
        letters.model_version = 2
        return NotServedHereError("It was unloaded.") if request.model == "letters@1" else None

    letters.fail = lambda request: None if request.model == "letters" and len(letters.requests) == 1 else moved(request)
    documents = ["x" * (1 + index % 10) for index in range(MAX_ITEMS)] + ["x" * 30]

    ranking = await call(targets, "rerank", "letters", "query", documents, top_k=1)

    assert (ranking.model_version, ranking.documents[0].index) == (2, MAX_ITEMS)
    assert [request.model for request in letters.requests] == ["letters", "letters@1", "letters", "letters@2"]


async def test_a_batch_for_a_numbered_version_that_is_unloaded_fails(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.fail = lambda _: NotServedHereError("It was unloaded.") if len(letters.requests) > 1 else None

    with pytest.raises(NotServedHereError, match="unloaded"):
        await call(targets, "embed", "letters@1", ["x"] * (MAX_ITEMS + 1))


async def test_a_part_that_fails_fails_the_whole_with_its_error(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.fail = lambda request: InvalidInputError("That is bad.", field="texts") if "bad" in request.texts else None

    with pytest.raises(InvalidInputError, match=r"That is bad\.") as caught:
        await call(targets, "embed", "letters", ["x"] * 3 * MAX_ITEMS + ["bad"])

    assert caught.value.field == "texts"
    assert caught.value.request_id
    assert caught.value.__cause__ is not None


async def test_a_full_queue_is_waited_for_within_a_large_batch(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.fail = lambda _: OverloadedError("The queue is full.") if len(letters.requests) in {1, 3} else None

    answer = await call(targets, "embed", "letters", ["x"] * (MAX_ITEMS + 1))

    assert (len(answer.vectors), len(letters.requests)) == (MAX_ITEMS + 1, 4)


async def test_a_small_request_that_a_full_queue_refuses_is_sent_again_a_few_times(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.fail = lambda _: OverloadedError("The queue is full.")

    with pytest.raises(OverloadedError, match=r"The queue is full\.") as caught:
        await call(targets, "embed", "letters", ["x"])

    assert caught.value.retry_after_s == pytest.approx(0.2)
    assert len(letters.requests) == 4

    letters.fail = lambda _: OverloadedError("The queue is full.") if len(letters.requests) < 7 else None
    assert (await call(targets, "embed", "letters", ["x"])).vectors.shape == (1, 2)


@pytest.mark.parametrize("texts", [1, 600], ids=["one call", "several"])
@pytest.mark.parametrize("timeout_s", [0, 0.0, -0.5])
async def test_no_time_left_is_no_default_but_an_error_before_anything_is_sent(
    call: Caller, letters: Letters, targets: dict[str, str], timeout_s: float, texts: int
) -> None:
    with pytest.raises(DeadlineExpiredError, match="The time was up before the call: timeout_s is"):
        await call(targets, "embed", "letters", ["x"] * texts, timeout_s=timeout_s)

    assert letters.requests == []
    with pytest.raises(InvalidInputError, match="timeout_s is NaN"):
        await call(targets, "embed", "letters", ["x"], timeout_s=float("nan"))
    await call(targets, "embed", "letters", ["x"], timeout_s=float("inf"))


async def test_an_error_of_a_part_names_the_item_as_the_caller_counts(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    def empty(request: pb.EmbedRequest) -> InvalidInputError | None:
        found = [index for index, text in enumerate(request.texts) if not text]
        fields = [f"texts[{index}]" for index in found]
        return InvalidInputError(f"{', '.join(fields)} is empty.", fields=fields) if found else None

    letters.fail = empty
    texts = ["x"] * 720
    texts[700] = texts[710] = ""

    with pytest.raises(InvalidInputError, match=r"^texts\[700\], texts\[710\] is empty") as caught:
        await call(targets, "embed", "letters", texts)

    assert (caught.value.field, caught.value.indexes) == ("texts[700]", (700, 710))


async def test_texts_may_be_any_iterable_that_has_an_order(call: Caller, targets: dict[str, str]) -> None:
    answer = await call(targets, "embed", "letters", ("x" * n for n in (1, 2, 3)))
    assert answer.vectors[:, 0].tolist() == [1, 2, 3]


async def test_a_service_that_does_not_know_a_call_is_named_with_its_address(
    call: Caller, targets: dict[str, str]
) -> None:
    wrong = {"manager": targets["inference"]}
    with pytest.raises(UnknownCallError) as caught:
        await call(wrong, "models")
    assert caught.value.message == (
        f"The manager service at {targets['inference']} does not know this call: Method not found!. Is another service "
        "there, or an older release? Say where the right one is with MODELFLEET_MANAGER."
    )


async def test_a_client_that_is_closed_says_so(targets: dict[str, str]) -> None:
    with Client(**targets) as client:
        pass
    async with AsyncClient(**targets) as async_client:
        pass
    with pytest.raises(StateConflictError, match="This client is closed"):
        client.embed("letters", ["x"])
    with pytest.raises(StateConflictError, match="This client is closed"):
        await async_client.embed("letters", ["x"])
    with pytest.raises(StateConflictError, match="This client is closed"):
        next(client.generate("letters", "x"))


async def test_a_timeout_is_for_all_that_a_call_asks(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    letters.fail = lambda _: OverloadedError("The queue is full.")

    with pytest.raises((OverloadedError, DeadlineExpiredError)):
        await call(targets, "embed", "letters", ["x"] * (3 * MAX_ITEMS), timeout_s=0.5)

    assert len(letters.requests) < 5  # of ten tries, whose pauses are 13 s


async def test_the_failure_of_a_part_ends_the_others(letters: Letters, targets: dict[str, str]) -> None:
    def fail(request: pb.EmbedRequest) -> ModelfleetError | None:
        if request.texts[0] == "first":
            return None
        if request.texts[0] == "bad" and len(letters.requests) > AT_ONCE:
            return InvalidInputError("The text is bad.")
        return OverloadedError("The queue is full.")

    letters.fail = fail
    texts = ["first", *["x"] * (MAX_ITEMS - 1), *["y"] * (2 * MAX_ITEMS), *["bad"] * MAX_ITEMS]

    with pytest.raises(InvalidInputError, match="The text is bad"):
        await Caller(asynchronous=False)(targets, "embed", "letters", texts)

    asked = len(letters.requests)
    for thread in threading.enumerate():
        if thread.name.startswith("modelfleet-part"):
            await asyncio.to_thread(thread.join)
    assert len(letters.requests) <= asked + AT_ONCE - 1  # at most what was under way


async def test_only_a_few_parts_are_under_way_at_once() -> None:
    under_way, most = 0, 0

    class Slow(Letters):
        async def Embed(self, request: pb.EmbedRequest, context: object) -> pb.EmbedResponse:  # noqa: N802
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.01)  # long enough for others to come meanwhile, if they did
            under_way -= 1
            return await super().Embed(request, context)

    async with serving_letters(Slow()) as targets, AsyncClient(**targets) as client:
        await client.embed("letters", ["x"] * (12 * MAX_ITEMS))

    assert most == AT_ONCE


async def test_labels_and_entities_come_a_text_at_a_time(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    texts = ["alpha", "beta"] * MAX_ITEMS

    classified = await call(targets, "classify", "letters", texts, top_k=1)
    extracted = await call(targets, "extract_entities", "letters", texts, min_score=0.25)

    assert [result.labels[0].label for result in classified.results] == ["a", "b"] * MAX_ITEMS
    assert [result.entities[0].text for result in extracted.results] == ["a", "b"] * MAX_ITEMS
    assert (letters.requests[0].top_k, letters.requests[-1].min_score) == (1, 0.25)


@pytest.mark.parametrize("raw", [False, True])
async def test_documents_are_ranked_over_all_parts(call: Caller, targets: dict[str, str], raw: bool) -> None:
    documents = ["x" * (1 + index % 10) for index in range(MAX_ITEMS - 1)] + ["x" * 20] + ["x" * 30]
    assert probability(20) == probability(30)  # probabilities alone would leave them as they were

    ranking = await call(targets, "rerank", "letters", "query", documents, top_k=3, raw_scores=raw)

    assert [document.index for document in ranking.documents] == [MAX_ITEMS, MAX_ITEMS - 1, 9]
    expected = [30, 20, 10] if raw else [probability(30), probability(20), probability(10)]
    assert [document.score for document in ranking.documents] == pytest.approx(expected)


async def test_tensors_go_and_come_by_name(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    inputs = {"x": np.arange(6, dtype=np.int64).reshape(2, 3), "texts": np.array(["a", "b"])}

    outputs = await call(targets, "infer", "letters@2", inputs, outputs=["x", "texts"])

    assert np.array_equal(outputs["x"], inputs["x"])
    assert outputs["texts"].tolist() == [b"a", b"b"]
    assert letters.requests[0].model_version == "2"
    assert [output.name for output in letters.requests[0].outputs] == ["x", "texts"]


async def test_an_alias_travels_where_the_protocol_has_the_version(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    for reference in ("letters", "letters@stable", "letters@canary"):
        await call(targets, "infer", reference, {"x": np.zeros(1)})

    assert [request.model_version for request in letters.requests] == ["", "", "canary"]


async def test_affinity_keys_travel_with_every_call_and_all_its_parts(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    await call(targets, "embed", "letters", ["a"] * 300, affinity_key="user-1")
    await call(targets, "infer", "letters", {"x": np.zeros(1)}, affinity_key="user-2")
    await call(targets, "embed", "letters", ["a"])

    assert letters.affinity_keys[:-2] == ["user-1"] * (len(letters.affinity_keys) - 2)
    assert len(letters.affinity_keys) > 3
    assert letters.affinity_keys[-2:] == ["user-2", ""]


async def test_an_affinity_key_that_no_header_can_carry_is_refused(call: Caller, targets: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match=r"affinity_key is 'Zoë'\. Use printable ASCII"):
        await call(targets, "embed", "letters", ["a"], affinity_key="Zoë")


async def test_all_pages_of_served_models_are_read(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    letters.served = [served("a", 1, aliases=["stable"]), served("b", 1), served("b", 2, WARMING)]

    models = await call(targets, "served_models")

    assert [(model.model, model.model_version, model.state, model.task) for model in models] == [
        ("a", 1, "READY", "embed"),
        ("b", 1, "READY", "embed"),
        ("b", 2, "WARMING", "embed"),
    ]


async def test_waiting_ends_when_the_alias_names_the_ready_version(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.served = [served("m", 1, aliases=["stable"]), served("m", 2, WARMING)]
    asked = len(letters.requests)

    def flip_at_the_third_look(_request: object) -> None:
        if len(letters.requests) - asked == 5:
            letters.served = [served("m", 2, aliases=["stable"])]

    letters.fail = flip_at_the_third_look
    model = await call(targets, "wait_until_served", "m", model_version=2)

    assert (model.model_version, model.aliases) == (2, ("stable",))


async def test_waiting_for_a_version_that_cannot_load_ends_with_the_worker_s_reason(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.served = [served("m", 1, FAILED, state_reason="its graph does not parse")]

    with pytest.raises(StateConflictError, match="m@1 cannot be served: its graph does not parse"):
        await call(targets, "wait_until_served", "m@1")


async def test_waiting_too_long_ends_with_what_the_worker_said_last(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.served = [served("m", 1, WARMING)]

    with pytest.raises(DeadlineExpiredError, match=r"m@1 is not served after 0\.3 s: the worker holds m@1 \(WARMING\)"):
        await call(targets, "wait_until_served", "m@1", timeout_s=0.3)


async def test_errors_of_the_service_are_raised_as_they_were(
    call: Caller, letters: Letters, targets: dict[str, str]
) -> None:
    letters.fail = lambda _: ModelNotFoundError("No model 'm' is registered.", field="model")

    with pytest.raises(ModelNotFoundError, match="No model 'm' is registered") as caught:
        await call(targets, "embed", "m", ["a"])

    assert (caught.value.field, len(letters.requests)) == ("model", 1)


async def test_unavailable_is_tried_again(call: Caller, letters: Letters, targets: dict[str, str]) -> None:
    letters.fail = lambda _: DrainingError("Try another replica.") if len(letters.requests) < 3 else None

    answer = await call(targets, "embed", "letters", ["a"])

    assert answer.vectors.tolist() == [[1, 1]]
    assert len(letters.requests) == 3


async def test_a_service_that_is_not_there_is_named_with_the_way_out(call: Caller) -> None:
    with pytest.raises(UnavailableError, match=r"inference service at 127\.0\.0\.1:1 .*MODELFLEET_INFERENCE"):
        await call({"inference": "127.0.0.1:1"}, "embed", "letters", ["a"])


async def test_a_call_ends_with_its_deadline(call: Caller) -> None:
    class Stuck(Letters):
        async def Embed(self, *_: object) -> None:  # noqa: N802
            await asyncio.Event().wait()

    async with serving_letters(Stuck(), drain_timeout_s=0) as targets:
        with pytest.raises(DeadlineExpiredError, match="did not answer in time"):
            await call({**targets, "timeout_s": 0.2}, "embed", "letters", ["a"])
        with pytest.raises(DeadlineExpiredError):
            await call(targets, "embed", "letters", ["a"], timeout_s=0.2)


async def test_a_call_that_is_cancelled_is_cancelled_in_the_service() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    class Stuck(Letters):
        async def Embed(self, *_: object) -> None:  # noqa: N802
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    async with serving_letters(Stuck()) as targets, AsyncClient(**targets) as client:
        task = asyncio.create_task(client.embed("letters", ["a"]))
        await began.wait()
        task.cancel()

        await asyncio.wait_for(cancelled.wait(), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one text"}, "not a list"),
        ({"texts": ["a"], "token_ids": [[1]]}, "Give one of them"),
        ({"token_ids": [[1.5]]}, "list of integers"),
        ({"texts": ["a"], "truncation": "middle"}, "Use one of right, left, forbidden"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_it_is(
    call: Caller, letters: Letters, targets: dict[str, str], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await call(targets, "embed", "letters", **arguments)

    assert letters.requests == []
