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
from modelfleet.api.oip.v2 import open_inference_pb2 as oip
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import ModelNotFoundError, NotFiniteError, NotServedHereError, WrongTaskError
from onnx import ModelProto, numpy_helper

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = StatusCode.INVALID_ARGUMENT
MAX_TEXTS = 100
WITHOUT_SPECIAL_TOKENS = json.dumps({**json.loads(wordpiece_json()), "post_processor": None}).encode()
_BEYOND = json.loads(wordpiece_json())
_BEYOND["added_tokens"].append(
    {
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "id": graphs.VOCABULARY_SIZE,
        "content": "<image_soft_token>",
        "special": True,
    }
)
WITH_TOKEN_BEYOND_THE_TABLE = json.dumps(_BEYOND).encode()
TEXT_TASKS = (
    (Task.EMBED, graphs.embedder),
    (Task.CLASSIFY, graphs.classifier),
    (Task.ENTITIES, graphs.labeller),
    (Task.RERANK, graphs.cross_encoder),
)


def overflowing(graph: ModelProto) -> ModelProto:
    """Let the word `mat` have a vector that is not finite in fp32."""
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.name == "table")
    vectors = numpy_helper.to_array(table).copy()
    vectors[json.loads(wordpiece_json())["model"]["vocab"]["mat"]] = np.inf
    table.CopyFrom(numpy_helper.from_array(vectors, "table"))
    return graph


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
    "special@1": graphs.text_bundle(graphs.embedder(), Task.EMBED, tokenizer=WITH_TOKEN_BEYOND_THE_TABLE),
    **{f"overflowing-{task.value}@1": graphs.text_bundle(overflowing(make()), task) for task, make in TEXT_TASKS},
    "logarithm@1": graphs.tensor_bundle(graphs.logarithm()),
    "logarithm@2": graphs.tensor_bundle(graphs.logarithm(), allow_nan=True),
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
        ({"texts": ["the", ""]}, "texts[1]", r"texts\[1\] is empty\. Give at least one character"),
        (
            {"texts": ["x" * 1_000_000]},
            "texts[0]",
            r"texts\[0\] has 1000000 bytes; a text has at most 524288\. Split it",
        ),
        ({"texts": ["😀" * 200_000]}, "texts[0]", r"texts\[0\] has 800000 bytes"),
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
        ("Rerank", pb.RerankRequest(model="reranker", documents=["a"]), "query", r"query is empty"),
        (
            "Rerank",
            pb.RerankRequest(model="reranker", query="a", documents=["b", ""]),
            "documents[1]",
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
    await refused(worker, call, INVALID, r"texts\[1\] has no tokens: .*Leave it out", field="texts[1]")
    await worker.inference.Embed(pb.EmbedRequest(model="bare", texts=["the"]))


@pytest.mark.parametrize(
    ("rpc", "request_type", "model", "field"),
    [
        ("Embed", pb.EmbedRequest, "embed", "texts"),
        ("Classify", pb.ClassifyRequest, "classify", "texts"),
        ("ExtractEntities", pb.ExtractEntitiesRequest, "entities", "texts"),
        ("Rerank", pb.RerankRequest, "rerank", "documents"),
    ],
)
async def test_an_answer_that_is_no_number_is_an_error_of_the_texts_that_have_it(
    worker: Worker, rpc: str, request_type: Any, model: str, field: str
) -> None:
    def ask(*texts: str) -> Any:
        query = {"query": "the"} if rpc == "Rerank" else {}
        return getattr(worker.inference, rpc)(request_type(model=f"overflowing-{model}", **{field: texts}, **query))

    error = await refused(
        worker,
        ask("the cat", "the mat", "cat", "mat"),
        StatusCode.INTERNAL,
        rf"^{field}\[1\], {field}\[3\]: overflowing-{model}@1 answers this input with NaN or infinity",
    )

    assert isinstance(error, NotFiniteError)
    assert error.fields == (f"{field}[1]", f"{field}[3]")
    assert error.indexes == (1, 3)
    await ask("the cat", "cat")


async def test_tensors_are_held_to_numbers_too_unless_the_manifest_allows_others(worker: Worker) -> None:
    def ask(model: str, *values: float) -> Any:
        request = oip.ModelInferRequest(model_name=model)
        request.inputs.add(name="x", datatype="FP32", shape=[len(values), 1]).contents.fp32_contents.extend(values)
        return worker.open_inference.ModelInfer(request)

    message = r"^inputs\[1\]: logarithm@1 answers this input with NaN or infinity\. Set `allow_nan: true`"
    error = await refused(worker, ask("logarithm@1", 1, -1, 2), StatusCode.INTERNAL, message)
    assert error.indexes == (1,)

    answer = await ask("logarithm@2", 1, 0, -1)
    assert str(list(answer.outputs[0].contents.fp32_contents)) == "[0.0, -inf, nan]"


async def test_a_token_that_the_model_has_no_vector_of_is_refused_and_counts_against_no_version(worker: Worker) -> None:
    texts = ["the cat", "the <image_soft_token>", "mat"]
    call = worker.inference.Embed(pb.EmbedRequest(model="special", texts=texts))

    await refused(
        worker,
        call,
        INVALID,
        rf"^texts\[1\]: the token id {OUTSIDE} is outside the model's vocabulary, which has {OUTSIDE} ids, though",
        field="texts[1]",
    )

    await worker.inference.Embed(pb.EmbedRequest(model="special", texts=[texts[0], texts[2]]))
    statistics = await worker.open_inference.ModelStatistics(oip.ModelStatisticsRequest(name="special"))
    assert statistics.model_stats[0].inference_stats.fail.count == 0


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
    await refused(
        worker,
        call,
        INVALID,
        r"^token_ids\[0\]: The graph of masked@1 cannot compute with the tokens of this input\. ",
        field="token_ids[0]",
    )
    vector = np.frombuffer((await good).vectors, "<f4")
    np.testing.assert_allclose(vector, 2 * graphs.VECTORS[[2, 5, 3]].mean(axis=0), atol=1e-5)


async def test_a_message_larger_than_allowed_is_refused(worker: Worker) -> None:
    request = pb.EmbedRequest(model="embedder", texts=["x" * (1 << 19)] * 130)  # 65 MiB
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.inference.Embed(request)
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
    await still_embeds(worker)
