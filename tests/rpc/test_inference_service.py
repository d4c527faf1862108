"""Every RPC of InferenceService over real sessions, with the real tokenizer service."""

import threading
from collections.abc import AsyncIterator, Sequence
from functools import cache

import grpc
import numpy as np
import pytest
import pytest_asyncio
from harness import graphs
from harness.small_tokenizers import loaded, wordpiece_json
from harness.worker import Worker, running_worker
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.manifest import Activation, Task
from modelfleet.inference.tasks import classify
from modelfleet.inference.tasks.entities import LabelledWindow, extract
from tokenizers import Encoding

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = {
    "embedder@1": graphs.text_bundle(graphs.embedder(), Task.EMBED),
    "pooled@1": graphs.text_bundle(graphs.pooled_embedder(), Task.EMBED),
    "normal@1": graphs.text_bundle(graphs.embedder(), Task.EMBED, normalize=True),
    "classifier@1": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY),
    "classifier@2": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY, activation=Activation.SIGMOID),
    "labeller@1": graphs.text_bundle(graphs.labeller(), Task.ENTITIES),
    "reranker@1": graphs.text_bundle(graphs.cross_encoder(), Task.RERANK),
    "affine@1": graphs.tensor_bundle(graphs.affine()),
    "prompted@1": graphs.text_bundle(
        graphs.embedder(), Task.EMBED, prompt="the cat: ", normalize=True, truncate_dimensions=2
    ),
    "regression@1": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY, activation="none"),
    "relevance@1": graphs.text_bundle(graphs.cross_encoder(), Task.RERANK, activation="none"),
}
ROOM = graphs.MAX_TOKENS - 2
LONG = "the cat sat on the mat, hello world 中文 😀 token token cat mat hello the end of a long text"
TEXTS = ["the cat", "hello world, hello mat", "中文 😀", "x", LONG]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    async with running_worker(tmp_path_factory.mktemp("worker")) as worker:
        await worker.serve(MODELS)
        yield worker


@cache
def encoded(text: str, pair: str | None = None) -> Encoding:
    return loaded(wordpiece_json()).library.encode(text, pair)


def cut(text: str) -> list[int]:
    ids = encoded(text).ids
    return ids if len(ids) <= graphs.MAX_TOKENS else [*ids[: graphs.MAX_TOKENS - 1], ids[-1]]


def covering(text: str, stride: int) -> list[list[int]]:
    ids = encoded(text).ids
    content = ids[1:-1]
    starts = range(0, max(len(content) - stride, 1), ROOM - stride)
    return [[ids[0], *content[start : start + ROOM], ids[-1]] for start in starts]


def embedded(ids: Sequence[int]) -> np.ndarray:
    return 2 * graphs.VECTORS[list(ids)].mean(axis=0)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def vectors(answer: pb.EmbedResponse) -> np.ndarray:
    return np.frombuffer(answer.vectors, "<f4").reshape(-1, answer.dimensions)


def token_ids(*texts: Sequence[int]) -> pb.TokenIds:
    return pb.TokenIds(
        ids=np.concatenate(texts).astype("<i4").tobytes(), lengths=np.array([len(t) for t in texts], "<i4").tobytes()
    )


def label_scores(classification: pb.Classification) -> dict[str, float]:
    return {scored.label: scored.score for scored in classification.labels}


def label_logits(ids: Sequence[int]) -> np.ndarray:
    return graphs.LABEL_LOGITS[list(ids)].mean(axis=0)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


async def test_texts_become_the_vectors_that_tokenizer_and_graph_give(worker: Worker) -> None:
    answer = await worker.inference.Embed(pb.EmbedRequest(model="embedder", texts=TEXTS))
    np.testing.assert_allclose(vectors(answer), [embedded(cut(text)) for text in TEXTS], atol=1e-5)
    assert (answer.model, answer.model_version, answer.dimensions) == ("embedder", 1, graphs.DIMENSIONS)


async def test_each_text_comes_with_what_was_done_to_it(worker: Worker) -> None:
    answer = await worker.inference.Embed(pb.EmbedRequest(model="embedder", texts=["the cat", LONG]))
    assert list(answer.usage) == [
        pb.TextUsage(token_count=4, truncated=False, window_count=1),
        pb.TextUsage(token_count=len(encoded(LONG)), truncated=True, window_count=1),
    ]


async def test_a_graph_that_pools_and_normalises_is_served_as_it_is(worker: Worker) -> None:
    answer = await worker.inference.Embed(pb.EmbedRequest(model="pooled", texts=["the cat"]))
    np.testing.assert_allclose(vectors(answer), [unit(embedded(cut("the cat")))], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "asked", "normalized"),
    [("embedder", None, False), ("embedder", True, True), ("normal", None, True), ("normal", False, False)],
)
async def test_vectors_are_normalized_as_asked_or_as_the_manifest_says(
    worker: Worker, model: str, asked: bool | None, normalized: bool
) -> None:
    answer = await worker.inference.Embed(pb.EmbedRequest(model=model, texts=["the cat"], normalize=asked))
    expected = embedded(cut("the cat"))
    np.testing.assert_allclose(vectors(answer), [unit(expected) if normalized else expected], atol=1e-5)


async def test_leading_dimensions_are_kept_and_then_normalized(worker: Worker) -> None:
    request = pb.EmbedRequest(model="embedder", texts=["the cat"], dimensions=2, normalize=True)
    answer = await worker.inference.Embed(request)
    np.testing.assert_allclose(vectors(answer), [unit(embedded(cut("the cat"))[:2])], atol=1e-5)


async def test_token_ids_skip_the_tokenizer(worker: Worker) -> None:
    texts = [cut(text) for text in TEXTS]
    answer = await worker.inference.Embed(pb.EmbedRequest(model="embedder", token_ids=token_ids(*texts)))
    np.testing.assert_allclose(vectors(answer), [embedded(ids) for ids in texts], atol=1e-5)
    assert [usage.token_count for usage in answer.usage] == [len(ids) for ids in texts]


@pytest.mark.parametrize("stride", [0, 3, ROOM - 1])
async def test_windows_cover_a_long_text_and_weigh_by_their_tokens(worker: Worker, stride: int) -> None:
    request = pb.EmbedRequest(
        model="embedder", texts=["the cat", LONG], windowing=tokenizer_pb2.Windowing(stride=stride)
    )
    answer = await worker.inference.Embed(request)
    parts = covering(LONG, stride)
    expected = np.average([embedded(part) for part in parts], axis=0, weights=[len(part) for part in parts])
    np.testing.assert_allclose(vectors(answer), [embedded(cut("the cat")), expected], atol=1e-5)
    assert [(usage.window_count, usage.truncated) for usage in answer.usage] == [(1, False), (len(parts), False)]


async def test_a_text_is_cut_on_the_side_that_was_asked_for(worker: Worker) -> None:
    request = pb.EmbedRequest(model="embedder", texts=[LONG], truncation=tokenizer_pb2.TRUNCATION_LEFT)
    ids = encoded(LONG).ids
    answer = await worker.inference.Embed(request)
    np.testing.assert_allclose(vectors(answer), [embedded([ids[0], *ids[1 - graphs.MAX_TOKENS :]])], atol=1e-5)


async def test_labels_come_by_falling_score(worker: Worker) -> None:
    answer = await worker.inference.Classify(pb.ClassifyRequest(model="classifier@1", texts=TEXTS))
    assert (answer.model, answer.model_version) == ("classifier", 1)
    for text, classification in zip(TEXTS, answer.classifications, strict=True):
        expected = dict(zip(graphs.LABELS, softmax(label_logits(cut(text))), strict=True))
        assert label_scores(classification) == pytest.approx(expected, abs=1e-5)
        scores = [scored.score for scored in classification.labels]
        assert scores == sorted(scores, reverse=True)
        assert classification.usage.token_count == len(encoded(text))


@pytest.mark.parametrize(("texts", "beside"), [(1, False), (1000, True)])
async def test_many_scores_do_not_hold_up_the_event_loop(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, texts: int, beside: bool
) -> None:
    threads: set[threading.Thread] = set()
    rank, write = classify.ranked, pb.LabelScore

    def watched(*args: object) -> object:
        threads.add(threading.current_thread())
        return rank(*args)

    def written(**fields: object) -> pb.LabelScore:
        threads.add(threading.current_thread())
        return write(**fields)

    monkeypatch.setattr(classify, "ranked", watched)
    monkeypatch.setattr(pb, "LabelScore", written)
    answer = await worker.inference.Classify(pb.ClassifyRequest(model="classifier@1", texts=["cat"] * texts))

    assert len(answer.classifications) == texts
    assert (threading.main_thread() not in threads) is beside


async def test_labels_that_exclude_nothing_are_scored_each_on_its_own(worker: Worker) -> None:
    answer = await worker.inference.Classify(pb.ClassifyRequest(model="classifier@2", texts=["the cat"]))
    expected = dict(zip(graphs.LABELS, 1 / (1 + np.exp(-label_logits(cut("the cat")))), strict=True))
    assert label_scores(answer.classifications[0]) == pytest.approx(expected, abs=1e-5)


async def test_only_the_best_labels_are_kept_when_asked_for(worker: Worker) -> None:
    answer = await worker.inference.Classify(pb.ClassifyRequest(model="classifier@1", texts=["the cat"], top_k=1))
    best = graphs.LABELS[label_logits(cut("the cat")).argmax()]
    assert [scored.label for scored in answer.classifications[0].labels] == [best]


async def test_a_long_text_is_classified_over_windows(worker: Worker) -> None:
    request = pb.ClassifyRequest(model="classifier@1", texts=[LONG], windowing=tokenizer_pb2.Windowing(stride=2))
    answer = await worker.inference.Classify(request)
    parts = covering(LONG, 2)
    scores = np.average([softmax(label_logits(part)) for part in parts], axis=0, weights=[len(part) for part in parts])
    expected = dict(zip(graphs.LABELS, scores, strict=True))
    assert label_scores(answer.classifications[0]) == pytest.approx(expected, abs=1e-5)


async def test_token_ids_are_classified(worker: Worker) -> None:
    request = pb.ClassifyRequest(model="classifier@1", token_ids=token_ids(cut("the cat")))
    answer = await worker.inference.Classify(request)
    expected = dict(zip(graphs.LABELS, softmax(label_logits(cut("the cat"))), strict=True))
    assert label_scores(answer.classifications[0]) == pytest.approx(expected, abs=1e-5)


def entities_in(text: str) -> list[tuple[str, str, int, int]]:
    """Work out the entities of a whole text, in one window of any length."""
    encoding = encoded(text)
    logits = graphs.ENTITY_LOGITS[encoding.ids]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    window = LabelledWindow(probabilities, np.array(encoding.offsets, np.int32))
    found = extract(text, [window], graphs.ENTITY_LABELS, 0.0)
    return [(entity.label, entity.text, entity.start, entity.end) for entity in found]


def found_in(result: pb.EntityList) -> list[tuple[str, str, int, int]]:
    return [(entity.label, entity.text, entity.start, entity.end) for entity in result.entities]


@pytest.mark.parametrize("stride", [0, 1, 5, ROOM - 1])
async def test_entities_over_windows_are_those_of_the_whole_text(worker: Worker, stride: int) -> None:
    request = pb.ExtractEntitiesRequest(model="labeller", texts=TEXTS, windowing=tokenizer_pb2.Windowing(stride=stride))
    answer = await worker.inference.ExtractEntities(request)
    assert (answer.model, answer.model_version) == ("labeller", 1)
    assert [found_in(result) for result in answer.results] == [entities_in(text) for text in TEXTS]
    assert any(found_in(result) for result in answer.results)


async def test_entities_of_many_texts_are_those_of_each(worker: Worker) -> None:
    texts = TEXTS * 60  # enough to be read beside the event loop
    request = pb.ExtractEntitiesRequest(model="labeller", texts=texts, windowing=tokenizer_pb2.Windowing(stride=2))
    answer = await worker.inference.ExtractEntities(request)
    assert [found_in(result) for result in answer.results] == [entities_in(text) for text in TEXTS] * 60


async def test_entities_are_spans_of_characters_of_the_text_as_sent(worker: Worker) -> None:
    text = "😀👩‍👩‍👧 中文 Ünïcode the CAT"
    answer = await worker.inference.ExtractEntities(pb.ExtractEntitiesRequest(model="labeller", texts=[text]))
    assert answer.results[0].entities
    for entity in answer.results[0].entities:
        assert text[entity.start : entity.end] == entity.text
        assert 0 < entity.score <= 1


async def test_weak_entities_are_left_out(worker: Worker) -> None:
    every = await worker.inference.ExtractEntities(pb.ExtractEntitiesRequest(model="labeller", texts=TEXTS))
    scores = sorted(entity.score for result in every.results for entity in result.entities)
    threshold = scores[len(scores) // 2]
    request = pb.ExtractEntitiesRequest(model="labeller", texts=TEXTS, min_score=threshold)
    strong = await worker.inference.ExtractEntities(request)
    kept = sorted(entity.score for result in strong.results for entity in result.entities)
    assert kept == [score for score in scores if score >= threshold]


DOCUMENTS = ["the mat", "cat", "hello world", "cat"]


def relevance(query: str, document: str) -> float:
    encoding = encoded(query, document)
    of_document = [id_ for id_, kind in zip(encoding.ids, encoding.type_ids, strict=True) if kind == 1]
    return float(graphs.RELEVANCE[of_document].sum())


async def test_documents_come_by_falling_relevance_and_equal_ones_in_order(worker: Worker) -> None:
    request = pb.RerankRequest(model="reranker", query="the cat", documents=DOCUMENTS, raw_scores=True)
    answer = await worker.inference.Rerank(request)
    expected = [relevance("the cat", document) for document in DOCUMENTS]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))
    assert [document.index for document in answer.documents] == order
    assert [document.score for document in answer.documents] == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert [document.usage.token_count for document in answer.documents] == [
        len(encoded("the cat", DOCUMENTS[index])) for index in order
    ]
    assert (answer.model, answer.model_version) == ("reranker", 1)


async def test_relevance_lies_between_0_and_1_unless_raw_scores_are_asked_for(worker: Worker) -> None:
    request = pb.RerankRequest(model="reranker", query="the cat", documents=DOCUMENTS, top_k=2)
    answer = await worker.inference.Rerank(request)
    logits = sorted((relevance("the cat", document) for document in DOCUMENTS), reverse=True)[:2]
    expected = [1 / (1 + np.exp(-logit)) for logit in logits]
    assert [document.score for document in answer.documents] == pytest.approx(expected, abs=1e-5)


async def test_a_long_document_is_as_relevant_as_its_best_window(worker: Worker) -> None:
    request = pb.RerankRequest(
        model="reranker",
        query="cat",
        documents=[LONG, "the mat"],
        raw_scores=True,
        windowing=tokenizer_pb2.Windowing(stride=0),
    )
    answer = await worker.inference.Rerank(request)
    by_index = {document.index: document for document in answer.documents}
    content = encoded("cat", LONG)
    document = [id_ for id_, kind in zip(content.ids, content.type_ids, strict=True) if kind == 1]
    room = graphs.MAX_TOKENS - (len(content.ids) - len(document) + 1)
    starts = range(0, len(document) - 1, room)
    parts = [[*document[:-1][start : start + room], document[-1]] for start in starts]
    best = max(float(graphs.RELEVANCE[part].sum()) for part in parts)
    assert by_index[0].score == pytest.approx(best, abs=1e-5)
    assert by_index[0].usage.window_count == len(parts)
    assert by_index[1].score == pytest.approx(relevance("cat", "the mat"), abs=1e-5)


async def test_a_request_chooses_how_words_are_labelled(worker: Worker) -> None:
    def ask(aggregation: int) -> grpc.aio.UnaryUnaryCall:
        request = pb.ExtractEntitiesRequest(model="labeller", texts=["the tokening"], aggregation=aggregation)
        return worker.inference.ExtractEntities(request)

    unsaid, first, simple = [
        [(one.label, one.text) for one in (await ask(way)).results[0].entities]
        for way in (pb.AGGREGATION_UNSPECIFIED, pb.AGGREGATION_FIRST, pb.AGGREGATION_SIMPLE)
    ]
    assert unsaid == first == [("CAT", "the"), ("MAT", "tokening")]
    assert simple == [("CAT", "the"), ("MAT", "token"), ("CAT", "ing")]
    with pytest.raises(grpc.aio.AioRpcError, match="aggregation is 9, which this release does not know") as caught:
        await ask(9)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_s_prompt_is_put_before_each_text_and_its_dimensions_are_cut_last(worker: Worker) -> None:
    answer = await worker.inference.Embed(pb.EmbedRequest(model="prompted", texts=["mat", "hello"]))
    whole = [unit(embedded(encoded(f"the cat: {text}").ids)) for text in ("mat", "hello")]
    np.testing.assert_allclose(vectors(answer), [vector[:2] for vector in whole], atol=1e-5)
    assert answer.usage[0].token_count == len(encoded("the cat: mat").ids)

    answer = await worker.inference.Embed(pb.EmbedRequest(model="prompted", texts=["mat"], dimensions=3))
    np.testing.assert_allclose(vectors(answer), [unit(embedded(encoded("the cat: mat").ids)[:3])], atol=1e-5)

    windows = pb.EmbedRequest(model="prompted", texts=["mat"], windowing=tokenizer_pb2.Windowing(stride=2))
    left = pb.EmbedRequest(model="prompted", texts=[LONG], truncation=tokenizer_pb2.TRUNCATION_LEFT)
    with pytest.raises(grpc.aio.AioRpcError, match="which truncation would take away"):
        await worker.inference.Embed(left)
    with pytest.raises(grpc.aio.AioRpcError, match="prompted@1 puts a prompt before each text") as caught:
        await worker.inference.Embed(windows)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_scores_without_an_activation_are_what_the_graph_says(worker: Worker) -> None:
    answer = await worker.inference.Classify(pb.ClassifyRequest(model="regression", texts=["the cat"]))
    logits = graphs.LABEL_LOGITS[encoded("the cat").ids].mean(axis=0)
    scores = {label.label: label.score for label in answer.classifications[0].labels}
    assert scores == pytest.approx(dict(zip(graphs.LABELS, logits.tolist(), strict=True)), abs=1e-5)

    ranked = await worker.inference.Rerank(pb.RerankRequest(model="relevance", query="cat", documents=["the mat"]))
    assert ranked.documents[0].score == pytest.approx(relevance("cat", "the mat"), abs=1e-5)


async def test_versions_are_listed_in_order_with_what_they_are(worker: Worker) -> None:
    listed = (await worker.inference.ListServedModels(pb.ListServedModelsRequest())).models
    assert [f"{model.model}@{model.model_version}" for model in listed] == sorted(MODELS)
    by_key = {f"{model.model}@{model.model_version}": model for model in listed}
    sample = MODELS["classifier@2"].bundle
    deviation = by_key["classifier@2"].batching_deviation
    assert 0 <= deviation < 1e-5
    assert by_key["classifier@2"] == pb.ServedModel(
        model="classifier",
        model_version=2,
        bundle_digest=sample.digest,
        task=pb.TASK_CLASSIFY,
        state=version_state_pb2.VERSION_STATE_READY,
        aliases=["stable"],
        providers=["CPUExecutionProvider"],
        max_tokens=graphs.MAX_TOKENS,
        max_batch_tokens=512,
        labels=graphs.LABELS,
        tokenizer_digest=sample.tokenizer_digest,
        batching=pb.BATCHING_PADDED,
        batching_deviation=deviation,
    )
    assert by_key["classifier@1"].aliases == []
    assert (by_key["affine@1"].task, by_key["affine@1"].tokenizer_digest) == (pb.TASK_TENSOR, "")


async def test_the_list_comes_in_pages(worker: Worker) -> None:
    keys, token = [], ""
    while True:
        page = await worker.inference.ListServedModels(pb.ListServedModelsRequest(page_size=3, page_token=token))
        assert len(page.models) == 3 or not page.next_page_token
        keys += [f"{model.model}@{model.model_version}" for model in page.models]
        if not (token := page.next_page_token):
            break
    assert keys == sorted(MODELS)
