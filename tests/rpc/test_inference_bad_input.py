"""What cannot be answered is refused with its code, a sentence that helps, and no harm to the worker."""

import json
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode
from harness import graphs
from harness.small_tokenizers import wordpiece_json
from harness.worker import Worker, refused, running_worker, still_embeds
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import ModelNotFoundError, NotServedHereError, SessionFailureError, WrongTaskError

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = StatusCode.INVALID_ARGUMENT
MAX_TEXTS = 100
WITHOUT_SPECIAL_TOKENS = json.dumps({**json.loads(wordpiece_json()), "post_processor": None}).encode()
MODELS = {
    "bare@1": graphs.text_bundle(graphs.embedder(), Task.EMBED, tokenizer=WITHOUT_SPECIAL_TOKENS),
    "embedder@1": graphs.text_bundle(graphs.embedder(), Task.EMBED),
    "unchecked@1": graphs.text_bundle(graphs.embedder(), Task.EMBED, vocabulary_size=None),
    "masked@1": graphs.text_bundle(graphs.embedder_of_masked_ids(), Task.EMBED, vocabulary_size=None),
    "types@1": graphs.text_bundle(graphs.embedder_of_types(), Task.EMBED),
    "classifier@1": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY),
    "labeller@1": graphs.text_bundle(graphs.labeller(), Task.ENTITIES),
    "reranker@1": graphs.text_bundle(graphs.cross_encoder(), Task.RERANK),
    "affine@1": graphs.tensor_bundle(graphs.affine()),
}
LONG = "the cat sat on the mat " * 5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    async with running_worker(tmp_path_factory.mktemp("worker"), max_texts=MAX_TEXTS) as worker:
        worker.manager.registered.add("elsewhere")
        await worker.serve(MODELS)
        yield worker


def packed(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def token_ids(ids: bytes = packed(2, 5, 3), lengths: bytes = packed(3), type_ids: bytes = b"") -> dict[str, Any]:
    return {"token_ids": pb.TokenIds(ids=ids, lengths=lengths, type_ids=type_ids)}


OUTSIDE = graphs.VOCABULARY_SIZE
WINDOWING = tokenizer_pb2.Windowing


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({}, "texts", r"texts is empty\. Give at least one text"),
        ({"texts": ["the", ""]}, "texts", r"texts\[1\] is empty\. Give at least one character"),
        ({"texts": ["x" * 1_000_000]}, "texts", r"texts\[0\] has 1000000 bytes; a text has at most 524288\. Split it"),
        ({"texts": ["😀" * 200_000]}, "texts", r"texts\[0\] has 800000 bytes"),
        ({"texts": ["a"] * 10_000}, "texts", r"texts has 10000 texts; one request takes at most 100\. Send several"),
        ({"texts": ["a"], "model": "No Name"}, "model", r"'No Name' cannot name a model"),
        ({"texts": ["a"], "model": "embedder@"}, "model", r"'' cannot name an alias"),
        ({"texts": ["a"], "dimensions": 5}, "dimensions", r"dimensions is 5; embedder@1 has 4\. Ask for 1 to 4"),
        ({"texts": ["a"], "dimensions": -1}, "dimensions", r"dimensions is -1"),
        ({"texts": ["a"], "truncation": 9}, "truncation", r"truncation is 9, which this release does not know"),
        ({"texts": ["a"], "windowing": WINDOWING(stride=14)}, "windowing.stride", r"stride is 14.* Use at most 13"),
        ({"texts": ["a"], "windowing": WINDOWING(stride=-1)}, "windowing.stride", r"stride is -1"),
        (
            {"texts": ["the", LONG], "truncation": tokenizer_pb2.TRUNCATION_FORBIDDEN},
            "texts[1]",
            r"texts\[1\] has 32 tokens, more than the 16 allowed, and truncation is forbidden",
        ),
        ({"texts": ["a"], **token_ids()}, "token_ids", r"Both texts and token_ids are given"),
        (token_ids(ids=b"", lengths=b""), "token_ids.lengths", r"token_ids is empty"),
        (token_ids(ids=b"12345"), "token_ids.ids", r"token_ids\.ids ends 1 bytes into a number"),
        (token_ids(lengths=b"123"), "token_ids.lengths", r"token_ids\.lengths ends 3 bytes into a number"),
        (token_ids(lengths=packed(2)), "token_ids.lengths", r"has 3 ids, and lengths that sum to 2"),
        (token_ids(lengths=packed(4, -1)), "token_ids.lengths", r"has the length -1"),
        (token_ids(lengths=packed(3, 0)), "token_ids.lengths", r"has the length 0"),
        (token_ids(packed(*[5] * 17), packed(17)), "token_ids.lengths", r"has 17 ids; the model takes at most 16"),
        (
            token_ids(packed(*[5] * 101), packed(*[1] * 101)),
            "token_ids",
            r"101 sequences; one request takes at most 100",
        ),
        (token_ids(packed(2, OUTSIDE, 3)), "token_ids.ids", rf"id {OUTSIDE} is outside .* which has {OUTSIDE} ids"),
        (token_ids(packed(2, -1, 3)), "token_ids.ids", r"id -1 is outside the model's vocabulary"),
        (
            {"model": "unchecked", **token_ids(packed(2, OUTSIDE, 3))},
            "token_ids.ids",
            rf"id {OUTSIDE} is outside .* which has {OUTSIDE} ids",
        ),
        (token_ids(type_ids=b"\0"), "token_ids.type_ids", r"has 3 ids and 1 type_ids"),
        (
            {"model": "types", **token_ids(type_ids=b"\0\2\1")},
            "token_ids.type_ids",
            r"type id 2 is outside the model's, which are 0 to 1",
        ),
    ],
)
async def test_embed_refuses(worker: Worker, given: dict[str, Any], field: str, message: str) -> None:
    request = pb.EmbedRequest(**{"model": "embedder", **given})
    await refused(worker, worker.inference.Embed(request), INVALID, message, field=field)
    await still_embeds(worker)


@pytest.mark.parametrize(
    ("rpc", "request_", "field", "message"),
    [
        ("Classify", pb.ClassifyRequest(model="classifier"), "texts", "texts is empty"),
        ("Classify", pb.ClassifyRequest(model="classifier", texts=["a"], top_k=-1), "top_k", "top_k is -1"),
        ("ExtractEntities", pb.ExtractEntitiesRequest(model="labeller"), "texts", "texts is empty"),
        (
            "ExtractEntities",
            pb.ExtractEntitiesRequest(model="labeller", texts=["a"], min_score=1.5),
            "min_score",
            "min_score is 1.5. Give a number from 0 to 1",
        ),
        (
            "ExtractEntities",
            pb.ExtractEntitiesRequest(model="labeller", texts=["a"], min_score=float("nan")),
            "min_score",
            "min_score is nan",
        ),
        ("Rerank", pb.RerankRequest(model="reranker", query="a"), "documents", "documents is empty"),
        ("Rerank", pb.RerankRequest(model="reranker", documents=["a"]), "query", r"query\[0\] is empty"),
        (
            "Rerank",
            pb.RerankRequest(model="reranker", query="a", documents=["b", ""]),
            "documents",
            r"documents\[1\] is empty",
        ),
        ("Rerank", pb.RerankRequest(model="reranker", query="a", documents=["b"], top_k=-2), "top_k", "top_k is -2"),
        (
            "Rerank",
            pb.RerankRequest(model="reranker", query=LONG, documents=[LONG], windowing=WINDOWING(stride=0)),
            "query",
            r"query has 30 tokens and is repeated whole in each window of 16",
        ),
        (
            "Rerank",
            pb.RerankRequest(
                model="reranker",
                query="cat",
                documents=["the", LONG],
                truncation=tokenizer_pb2.TRUNCATION_FORBIDDEN,
            ),
            "documents[1]",
            r"query with documents\[1\] has 34 tokens, more than the 16 allowed",
        ),
        ("ListServedModels", pb.ListServedModelsRequest(page_size=-1), "page_size", "page_size is -1"),
        (
            "ListServedModels",
            pb.ListServedModelsRequest(page_token="?"),
            "page_token",
            "page_token '[?]' is not one that this list",
        ),
        ("ListServedModels", pb.ListServedModelsRequest(page_token="eA=="), "page_token", "is not one that this list"),
        (
            "ListServedModels",
            pb.ListServedModelsRequest(page_token=urlsafe_b64encode(b"served models\nfoo@bar").decode()),
            "page_token",
            "is not one that this list",
        ),
    ],
)
async def test_other_calls_refuse(worker: Worker, rpc: str, request_: Any, field: str, message: str) -> None:
    await refused(worker, getattr(worker.inference, rpc)(request_), INVALID, message, field=field)
    await still_embeds(worker)


async def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused(worker: Worker) -> None:
    await worker.inference.Embed(pb.EmbedRequest(model="bare", texts=["the"]))
    call = worker.inference.Embed(pb.EmbedRequest(model="bare", texts=["the", " \t", "cat"]))
    await refused(worker, call, INVALID, r"texts\[1\] has no tokens: .*Leave it out", field="texts")
    await worker.inference.Embed(pb.EmbedRequest(model="bare", texts=["the"]))


async def test_a_model_that_nobody_knows_is_not_found(worker: Worker) -> None:
    for reference in ("nobody", "nobody@7", "nobody@canary"):
        call = worker.inference.Embed(pb.EmbedRequest(model=reference, texts=["a"]))
        error = await refused(worker, call, StatusCode.NOT_FOUND, r"No model 'nobody@\w+' is registered")
        assert isinstance(error, ModelNotFoundError)


async def test_a_model_that_is_registered_but_not_here_is_said_to_be(worker: Worker) -> None:
    call = worker.inference.Embed(pb.EmbedRequest(model="elsewhere", texts=["a"]))
    error = await refused(
        worker, call, StatusCode.FAILED_PRECONDITION, r"elsewhere@stable is registered but not served by this worker"
    )
    assert isinstance(error, NotServedHereError)


@pytest.mark.parametrize("model", ["classifier", "labeller", "reranker", "affine"])
async def test_a_model_of_another_task_is_named_with_its_task(worker: Worker, model: str) -> None:
    task = MODELS[f"{model}@1"].bundle.manifest.task
    call = worker.inference.Embed(pb.EmbedRequest(model=model, texts=["a"]))
    error = await refused(
        worker, call, INVALID, rf"{model}@1 is a model of the task '{task}', not 'embed'", field="model"
    )
    assert isinstance(error, WrongTaskError)


async def test_ids_that_only_the_session_knows_to_be_outside_fail_alone_and_leak_nothing(worker: Worker) -> None:
    request = pb.EmbedRequest(model="masked", **token_ids(packed(2, OUTSIDE, 3)))
    good = worker.inference.Embed(pb.EmbedRequest(model="masked", **token_ids()))
    call = worker.inference.Embed(request)
    error = await refused(worker, call, StatusCode.INTERNAL, r"^masked@1 failed on this input\. The server's log")
    assert isinstance(error, SessionFailureError)
    vector = np.frombuffer((await good).vectors, "<f4")
    np.testing.assert_allclose(vector, 2 * graphs.VECTORS[[2, 5, 3]].mean(axis=0), atol=1e-5)


async def test_a_message_larger_than_allowed_is_refused(worker: Worker) -> None:
    request = pb.EmbedRequest(model="embedder", texts=["x" * (1 << 19)] * 130)  # 65 MiB
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.inference.Embed(request)
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
    await still_embeds(worker)
