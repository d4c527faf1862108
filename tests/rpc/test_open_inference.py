"""The Open Inference Protocol over real sessions: metadata, every datatype raw and typed, text models, bad input."""

import json
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode
from harness import graphs
from harness.worker import Worker, refused, running_worker, still_embeds
from modelfleet.api.inference.v1 import inference_pb2
from modelfleet.api.oip.v2 import model_config_pb2
from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.bundle.manifest import Task
from modelfleet.inference import oip_servicer
from modelfleet.inference.oip_tensors import read_inputs
from onnx import TensorProto

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = StatusCode.INVALID_ARGUMENT
MAX_TEXTS = 100

# Datatype, ONNX's type, numpy's type, and the field of typed contents.
DATATYPES = [
    ("BOOL", TensorProto.BOOL, "?", "bool_contents"),
    ("INT8", TensorProto.INT8, "<i1", "int_contents"),
    ("INT16", TensorProto.INT16, "<i2", "int_contents"),
    ("INT32", TensorProto.INT32, "<i4", "int_contents"),
    ("INT64", TensorProto.INT64, "<i8", "int64_contents"),
    ("UINT8", TensorProto.UINT8, "<u1", "uint_contents"),
    ("UINT16", TensorProto.UINT16, "<u2", "uint_contents"),
    ("UINT32", TensorProto.UINT32, "<u4", "uint_contents"),
    ("UINT64", TensorProto.UINT64, "<u8", "uint64_contents"),
    ("FP16", TensorProto.FLOAT16, "<f2", ""),
    ("FP32", TensorProto.FLOAT, "<f4", "fp32_contents"),
    ("FP64", TensorProto.DOUBLE, "<f8", "fp64_contents"),
]
MODELS = {
    "embedder@1": graphs.text_bundle(graphs.embedder(), Task.EMBED),
    "embedder@2": graphs.text_bundle(graphs.embedder(), Task.EMBED, normalize=True),
    "classifier@1": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY),
    "labeller@1": graphs.text_bundle(graphs.labeller(), Task.ENTITIES),
    "reranker@1": graphs.text_bundle(graphs.cross_encoder(), Task.RERANK),
    "affine@1": graphs.tensor_bundle(graphs.affine()),
    "gaps@1": graphs.tensor_bundle(graphs.affine(), allow_nan=True),
    "fixed@1": graphs.tensor_bundle(graphs.fixed_batch()),
    "scalars@1": graphs.tensor_bundle(graphs.scalars()),
    "two@1": graphs.tensor_bundle(graphs.two_inputs()),
    "image@1": graphs.tensor_bundle(graphs.image()),
    "strings@1": graphs.tensor_bundle(graphs.echo(TensorProto.STRING)),
    **{f"{name.lower()}@1": graphs.tensor_bundle(graphs.echo(onnx_type)) for name, onnx_type, *_ in DATATYPES},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    async with running_worker(tmp_path_factory.mktemp("worker"), max_texts=MAX_TEXTS) as worker:
        await worker.serve(MODELS)
        yield worker


def request(model: str, version: str = "", **inputs: np.ndarray) -> pb.ModelInferRequest:
    """Make a request of float32 and int64 arrays with raw contents."""
    names = {"float32": "FP32", "int64": "INT64", "float64": "FP64"}
    message = pb.ModelInferRequest(model_name=model, model_version=version, id="id-1")
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=names[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message


def text_request(model: str, version: str = "", **inputs: Sequence[str | bytes]) -> pb.ModelInferRequest:
    """Make a request of BYTES with typed contents."""
    message = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, texts in inputs.items():
        contents = [text.encode() if isinstance(text, str) else text for text in texts]
        message.inputs.add(name=name, datatype="BYTES", shape=[len(texts)]).contents.bytes_contents.extend(contents)
    return message


def raw_bytes(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def raw_outputs(answer: pb.ModelInferResponse) -> dict[str, list[Any]]:
    return {
        output.name: np.frombuffer(raw, {"FP32": "<f4", "INT64": "<i8"}[output.datatype]).reshape(output.shape).tolist()
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


async def test_the_server_says_what_it_is_and_that_it_is_ready(worker: Worker) -> None:
    await worker.is_serving()
    assert (await worker.open_inference.ServerLive(pb.ServerLiveRequest())).live
    assert (await worker.open_inference.ServerReady(pb.ServerReadyRequest())).ready
    metadata = await worker.open_inference.ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "modelfleet"
    assert metadata.version
    assert set(metadata.extensions) == {"classification", "model_configuration", "statistics"}


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("affine", "", True),
        ("affine", "1", True),
        ("affine@stable", "", True),
        ("affine", "2", False),
        ("no", "", False),
    ],
)
async def test_a_model_is_ready_if_it_would_answer(worker: Worker, name: str, version: str, ready: bool) -> None:
    answer = await worker.open_inference.ModelReady(pb.ModelReadyRequest(name=name, version=version))
    assert answer.ready is ready


def described(specs: Any) -> list[tuple[str, str, list[int]]]:
    return [(spec.name, spec.datatype, list(spec.shape)) for spec in specs]


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("affine", [("x", "FP32", [-1, 3])], [("y", "FP32", [-1, 3])]),
        ("fixed", [("x", "FP32", [2, 3])], [("y", "FP32", [1, 3])]),
        ("image", [("pixels", "FP32", [-1, 3, 8, 8])], [("means", "FP32", [-1, 3])]),
        ("strings", [("x", "BYTES", [-1, 2])], [("y", "BYTES", [-1, 2])]),
        ("embedder", [("text", "BYTES", [-1, 1])], [("embeddings", "FP32", [-1, 4])]),
        ("classifier", [("text", "BYTES", [-1, 1])], [("scores", "FP32", [-1, 3]), ("labels", "BYTES", [-1, 3])]),
        ("labeller", [("text", "BYTES", [-1, 1])], [("entities", "BYTES", [-1, 1])]),
        ("reranker", [("query", "BYTES", [1]), ("documents", "BYTES", [-1])], [("scores", "FP32", [-1])]),
    ],
)
async def test_metadata_names_inputs_and_outputs(
    worker: Worker, model: str, inputs: list[object], outputs: list[object]
) -> None:
    metadata = await worker.open_inference.ModelMetadata(pb.ModelMetadataRequest(name=model))
    assert described(metadata.inputs) == inputs
    assert described(metadata.outputs) == outputs
    assert (metadata.name, metadata.platform) == (model, "onnxruntime_onnx")


@pytest.mark.parametrize("name", ["embedder", "embedder@1"])
async def test_metadata_lists_the_versions_that_are_ready(worker: Worker, name: str) -> None:
    metadata = await worker.open_inference.ModelMetadata(pb.ModelMetadataRequest(name=name))
    assert list(metadata.versions) == ["1", "2"]


async def test_the_config_says_how_requests_are_batched(worker: Worker) -> None:
    config = (await worker.open_inference.ModelConfig(pb.ModelConfigRequest(name="two"))).config
    assert (config.name, config.backend, config.max_batch_size) == ("two", "onnxruntime", MAX_TEXTS)
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in config.input] == [
        ("a", model_config_pb2.TYPE_FP32, [2]),
        ("b", model_config_pb2.TYPE_INT64, [2]),
    ]
    assert [(spec.name, list(spec.dims)) for spec in config.output] == [("sum", [2]), ("difference", [2])]
    assert config.HasField("dynamic_batching")
    assert list(config.version_policy.specific.versions) == [1]


async def test_the_config_of_a_graph_of_fixed_size_says_that_it_does_not_batch(worker: Worker) -> None:
    config = (await worker.open_inference.ModelConfig(pb.ModelConfigRequest(name="fixed"))).config
    assert config.max_batch_size == 0
    assert [list(spec.dims) for spec in (*config.input, *config.output)] == [[2, 3], [1, 3]]
    assert not config.HasField("dynamic_batching")


async def test_tensors_have_the_shape_that_the_config_says_where_a_batch_is_all_their_shape(worker: Worker) -> None:
    config = (await worker.open_inference.ModelConfig(pb.ModelConfigRequest(name="scalars"))).config
    assert config.max_batch_size == 0  # dims are the whole shape then
    assert [list(spec.dims) for spec in (*config.input, *config.output)] == [[-1], [-1]]
    answer = await worker.open_inference.ModelInfer(request("scalars", x=np.array([1, 2, 3], np.float32)))
    assert raw_outputs(answer) == {"y": [1, 2, 3]}


async def test_statistics_count_requests_rows_and_batches(worker: Worker) -> None:
    async def statistics() -> pb.ModelStatistics:
        (found,) = (await worker.open_inference.ModelStatistics(pb.ModelStatisticsRequest(name="image"))).model_stats
        return found

    before = await statistics()
    await worker.open_inference.ModelInfer(request("image", pixels=np.ones((5, 3, 8, 8), np.float32)))
    after = await statistics()
    assert (after.name, after.version) == ("image", "1")
    assert after.inference_count - before.inference_count == 5
    assert after.execution_count - before.execution_count == 1
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.inference_stats.success.ns > after.inference_stats.compute_infer.ns > 0
    assert after.last_inference > before.last_inference
    assert {batch.batch_size for batch in after.batch_stats} >= {5}


async def test_statistics_are_of_one_version_of_all_of_a_model_or_of_everything(worker: Worker) -> None:
    async def counted(**of: str) -> set[str]:
        answer = await worker.open_inference.ModelStatistics(pb.ModelStatisticsRequest(**of))
        return {f"{stats.name}@{stats.version}" for stats in answer.model_stats}

    assert await counted(name="embedder", version="1") == {"embedder@1"}
    assert await counted(name="embedder") == {"embedder@1", "embedder@2"}
    assert await counted() == set(MODELS)


VALUES = {
    "b": [[True, False], [False, True]],
    "f": [[-1.5, 0], [2.25, 3]],
    "u": [[0, 1], [200, 7]],
    "i": [[-1, 2], [100, -7]],
}


def values(numpy_type: str) -> np.ndarray:
    return np.array(VALUES[np.dtype(numpy_type).kind], numpy_type)


@pytest.mark.parametrize(("name", "numpy_type"), [(name, numpy_type) for name, _, numpy_type, _ in DATATYPES])
async def test_tensors_of_every_datatype_go_raw(worker: Worker, name: str, numpy_type: str) -> None:
    array = values(numpy_type)
    message = pb.ModelInferRequest(model_name=name.lower(), raw_input_contents=[array.tobytes()])
    message.inputs.add(name="x", datatype=name, shape=array.shape)
    answer = await worker.open_inference.ModelInfer(message)
    assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [("y", name, [2, 2])]
    assert list(answer.raw_output_contents) == [array.tobytes()]
    assert not answer.outputs[0].HasField("contents")


@pytest.mark.parametrize(
    ("name", "numpy_type", "field"), [(name, numpy_type, field) for name, _, numpy_type, field in DATATYPES if field]
)
async def test_tensors_of_every_datatype_but_fp16_go_typed(
    worker: Worker, name: str, numpy_type: str, field: str
) -> None:
    elements = values(numpy_type).ravel().tolist()
    message = pb.ModelInferRequest(model_name=name.lower())
    getattr(message.inputs.add(name="x", datatype=name, shape=[2, 2]).contents, field).extend(elements)
    answer = await worker.open_inference.ModelInfer(message)
    assert list(getattr(answer.outputs[0].contents, field)) == elements
    assert not answer.raw_output_contents


async def test_strings_reach_a_graph_as_strings(worker: Worker) -> None:
    message = text_request("strings", x=["a", "中文 😀"])
    message.inputs[0].shape[:] = [1, 2]
    answer = await worker.open_inference.ModelInfer(message)
    assert [element.decode() for element in answer.outputs[0].contents.bytes_contents] == ["a", "中文 😀"]
    message = pb.ModelInferRequest(model_name="strings", raw_input_contents=[raw_bytes(b"a", b"")])
    message.inputs.add(name="x", datatype="BYTES", shape=[1, 2])
    answer = await worker.open_inference.ModelInfer(message)
    assert list(answer.raw_output_contents) == [raw_bytes(b"a", b"")]


async def test_an_answer_says_what_was_asked_and_which_version_answered(worker: Worker) -> None:
    answer = await worker.open_inference.ModelInfer(request("two", a=np.ones((1, 2), np.float32), b=np.array([[3, 4]])))
    assert (answer.model_name, answer.model_version, answer.id) == ("two", "1", "id-1")
    assert raw_outputs(answer) == {"sum": [[4, 5]], "difference": [[-2, -3]]}


async def test_only_the_outputs_asked_for_are_sent_in_that_order(worker: Worker) -> None:
    message = request("two", a=np.ones((1, 2), np.float32), b=np.array([[3, 4]]))
    message.outputs.add(name="difference")
    assert raw_outputs(await worker.open_inference.ModelInfer(message)) == {"difference": [[-2, -3]]}
    message.outputs.add(name="sum")
    assert list(raw_outputs(await worker.open_inference.ModelInfer(message))) == ["difference", "sum"]


async def test_a_graph_of_fixed_size_runs_a_request_at_a_time(worker: Worker) -> None:
    x = np.array([[1, 5, 3], [4, 2, 6]], np.float32)
    assert raw_outputs(await worker.open_inference.ModelInfer(request("fixed", x=x))) == {"y": [[4, 5, 6]]}


async def test_nan_passes_where_the_manifest_allows_it(worker: Worker) -> None:
    x = np.array([[1, np.nan, 3]], np.float32)
    answer = raw_outputs(await worker.open_inference.ModelInfer(request("gaps", x=x)))
    np.testing.assert_equal(answer["y"], [[3, np.nan, 7]])


@pytest.mark.parametrize("shape", [[2], [2, 1]])
async def test_texts_go_as_bytes_and_vectors_come_back(worker: Worker, shape: list[int]) -> None:
    texts = ["the cat", "中文 😀"]
    message = pb.ModelInferRequest(model_name="embedder", model_version="1")
    message.inputs.add(name="text", datatype="BYTES", shape=shape)
    message.raw_input_contents.append(raw_bytes(*(text.encode() for text in texts)))
    answer = await worker.open_inference.ModelInfer(message)
    own = await worker.inference.Embed(inference_pb2.EmbedRequest(model="embedder@1", texts=texts))
    assert answer.raw_output_contents[0] == own.vectors
    assert list(answer.outputs[0].shape) == [2, graphs.DIMENSIONS]


async def test_a_classifier_answers_scores_and_labels_best_first(worker: Worker) -> None:
    answer = await worker.open_inference.ModelInfer(text_request("classifier", text=["the cat"]))
    own = await worker.inference.Classify(inference_pb2.ClassifyRequest(model="classifier", texts=["the cat"]))
    labels = own.classifications[0].labels
    scores, names = answer.outputs
    assert list(scores.contents.fp32_contents) == [scored.score for scored in labels]
    assert list(names.contents.bytes_contents) == [scored.label.encode() for scored in labels]


async def test_entities_come_as_json_for_each_text(worker: Worker) -> None:
    texts = ["the cat sat on the mat", "😀 中文 hello world"]
    answer = await worker.open_inference.ModelInfer(text_request("labeller", text=texts))
    own = await worker.inference.ExtractEntities(inference_pb2.ExtractEntitiesRequest(model="labeller", texts=texts))
    lists = [json.loads(element) for element in answer.outputs[0].contents.bytes_contents]
    assert [[(one["label"], one["text"], one["start"], one["end"]) for one in found] for found in lists] == [
        [(one.label, one.text, one.start, one.end) for one in result.entities] for result in own.results
    ]
    assert list(answer.outputs[0].shape) == [2, 1]


async def test_documents_are_scored_in_the_order_of_the_request(worker: Worker) -> None:
    documents = ["the mat", "cat", "hello world"]
    answer = await worker.open_inference.ModelInfer(text_request("reranker", query=["the cat"], documents=documents))
    own = await worker.inference.Rerank(
        inference_pb2.RerankRequest(model="reranker", query="the cat", documents=documents)
    )
    by_index = {document.index: document.score for document in own.documents}
    assert list(answer.outputs[0].contents.fp32_contents) == [by_index[index] for index in range(3)]


ONES = np.ones((1, 3), np.float32)


def affine(shape: Sequence[int] = (1, 3), raw: bytes = ONES.tobytes(), datatype: str = "FP32") -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="affine", raw_input_contents=[raw])
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    return message


def bytes_input(raw: bytes, shape: list[int]) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="embedder", raw_input_contents=[raw])
    message.inputs.add(name="text", datatype="BYTES", shape=shape)
    return message


def typed(model: str, datatype: str, field: str, elements: list[Any], shape: list[int]) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model)
    getattr(message.inputs.add(name="x", datatype=datatype, shape=shape).contents, field).extend(elements)
    return message


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (request("affine", x=ONES.astype(np.float64)), r"'x' has the dtype float64\. It is float32 \[any, 3\]"),
        (request("affine", x=np.ones((1, 4), np.float32)), r"'x' has the shape \[1, 4\]\. It is float32 \[any, 3\]"),
        (request("affine", x=np.ones(3, np.float32)), r"'x' has the shape \[3\]"),
        (request("affine", x=np.ones((0, 3), np.float32)), r"first dimension is 0\. Give at least one"),
        (request("affine", x=np.ones((101, 3), np.float32)), r"101 elements; one request takes at most 100"),
        (request("affine", x=np.array([[1, np.nan, 3]], np.float32)), r"'x' is NaN at \[0, 1\]\. Clean it, or set"),
        (request("affine"), r"'x' is missing\. It is float32 \[any, 3\]"),
        (request("affine", x=ONES, z=ONES), r"no input 'z'\. Its inputs are x"),
        (
            request("two", a=np.ones((1, 2), np.float32), b=np.ones((2, 2), np.int64)),
            r"first dimensions differ: \{'a': 1, 'b': 2\}",
        ),
        (affine(datatype="F4"), r"has the datatype 'F4'\. Use one of BOOL, INT8"),
        (affine([2, 3]), r"'x' of shape \[2, 3\] has 12 bytes, and its 6 elements have 24"),
        (affine([-1, 3]), r"\[-1, 3\]; no size is negative"),
        (affine([0, 2**62]), r"of shape \[0, 4611686018427387904\] has 12 bytes, and its 0 elements have 0"),
        (affine([0, 2**62], raw=b""), r"cannot have the shape \[0, 4611686018427387904\]"),
        (affine([*[1] * 70, 3]), r"'x' has 71 dimensions; a tensor has at most 64"),
        (affine(raw=b"123"), r"'x' of shape \[1, 3\] has 3 bytes, and its 3 elements have 12"),
        (typed("int8", "INT8", "int_contents", [1, 300], [1, 2]), r"'x' has a value outside of int8"),
        (typed("uint16", "UINT16", "uint_contents", [1, 70_000], [1, 2]), r"'x' has a value outside of uint16"),
        (typed("affine", "FP32", "int_contents", [1, 2, 3], [1, 3]), r"'x' has 0 elements"),
        (typed("fp16", "FP16", "fp32_contents", [1, 2], [1, 2]), r"FP16, which is sent in raw_input_contents"),
        (typed("strings", "BYTES", "bytes_contents", [b"a", b"\xff"], [1, 2]), r"element 1 is not UTF-8"),
        (bytes_input(b"\x05\0\0\0abc", [1]), r"'text' .* ends inside element 0 of 1, each of which is a length"),
        (bytes_input(b"\x05\0", [1]), r"'text' .* has 2 bytes, too few for the lengths of its 1 elements"),
        (bytes_input(bytes(400), [101]), r"'text' .* has 400 bytes, too few for the lengths of its 101 elements"),
        (bytes_input(raw_bytes(b"a", b"b"), [1]), r"'text' .* has 5 bytes behind its 1 elements"),
        (bytes_input(raw_bytes(b"a", b"b"), [1, 2]), r"'text' has the shape \[1, 2\]\. Send texts as"),
        (bytes_input(raw_bytes(b"ok", b"\xc3\x28"), [2]), r"'text', element 1 is not UTF-8: byte 0 is 0xc3"),
        (text_request("embedder", texts=["a"]), r"The model has no input 'texts'. Its inputs are text"),
        (request("embedder", text=ONES), r"'text' holds float32\. Send texts as BYTES"),
        (text_request("reranker", query=["a", "b"], documents=["c"]), r"'query' has 2 elements\. Give one"),
        (text_request("reranker", query=["a"]), r"'documents' is missing"),
    ],
)
async def test_tensors_that_do_not_fit_are_refused(worker: Worker, message: pb.ModelInferRequest, says: str) -> None:
    await refused(worker, worker.open_inference.ModelInfer(message), INVALID, says, field="inputs")
    await still_embeds(worker)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (bytes_input(bytes(4 * 5000), [5000]), r"5000 texts; one request takes at most 100"),
        (typed("strings", "BYTES", "bytes_contents", [b""] * 5000, [2500, 2]), r"2500 elements; .* at most 100"),
        (typed("fp32", "FP32", "fp32_contents", [0] * 5000, [2500, 2]), r"2500 elements; .* at most 100"),
    ],
)
async def test_inputs_of_many_elements_are_read_beside_the_event_loop(
    worker: Worker, message: pb.ModelInferRequest, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[threading.Thread] = []

    def read(request: pb.ModelInferRequest) -> dict[str, np.ndarray]:
        readers.append(threading.current_thread())
        return read_inputs(request)

    monkeypatch.setattr(oip_servicer, "read_inputs", read)
    with pytest.raises(grpc.aio.AioRpcError, match=says):
        await worker.open_inference.ModelInfer(message)
    await worker.open_inference.ModelInfer(text_request("embedder", text=["the cat"]))
    many, few = readers
    assert many is not threading.current_thread()
    assert few is threading.current_thread()


def twice(name: str) -> pb.ModelInferRequest:
    message = request("affine", x=ONES, y=ONES)
    message.inputs[1].name = name
    return message


def asking_for(output: str) -> pb.ModelInferRequest:
    message = request("affine", x=ONES)
    message.outputs.add(name=output)
    return message


def with_one_raw_too_many() -> pb.ModelInferRequest:
    message = request("affine", x=ONES)
    message.raw_input_contents.append(b"")
    return message


@pytest.mark.parametrize(
    ("message", "field", "says"),
    [
        (twice("x"), "inputs", r"'x' is given twice\. Give it once"),
        (asking_for("z"), "outputs", r"The model has no output 'z'\. Its outputs are y"),
        (with_one_raw_too_many(), "raw_input_contents", r"1 inputs and 2 raw_input_contents"),
        (bytes_input(b"", [0]), "texts", r"texts is empty"),
        (text_request("embedder", text=["a", ""]), "texts[1]", r"texts\[1\] is empty"),
        (text_request("embedder", text=["a"] * 101), "texts", r"101 texts; one request takes at most 100"),
        (request("affine@stable", "1", x=ONES), "model_name", r"cannot name an alias"),
        (request("", x=ONES), "model_name", r"'' cannot name a model"),
    ],
)
async def test_what_cannot_be_inferred_is_refused(
    worker: Worker, message: pb.ModelInferRequest, field: str, says: str
) -> None:
    await refused(worker, worker.open_inference.ModelInfer(message), INVALID, says, field=field)
    await still_embeds(worker)


async def test_what_is_asked_for_wrongly_costs_no_run(worker: Worker) -> None:
    async def executions() -> int:
        everything = await worker.open_inference.ModelStatistics(pb.ModelStatisticsRequest())
        return sum(stats.execution_count for stats in everything.model_stats)

    of_text = text_request("embedder", "1", text=["the cat"])
    of_text.outputs.add(name="vectors")
    too_wide = inference_pb2.EmbedRequest(model="embedder@1", texts=["the cat"], dimensions=5)
    before = await executions()
    for call in (
        worker.open_inference.ModelInfer(asking_for("z")),
        worker.open_inference.ModelInfer(of_text),
        worker.inference.Embed(too_wide),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is INVALID
    assert await executions() == before


@pytest.mark.parametrize("rpc", ["ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics"])
async def test_a_model_that_nobody_knows_is_not_found(worker: Worker, rpc: str) -> None:
    name = "model_name" if rpc == "ModelInfer" else "name"
    message = getattr(pb, f"{rpc}Request")(**{name: "nobody"})
    call = getattr(worker.open_inference, rpc)(message)
    await refused(worker, call, StatusCode.NOT_FOUND, "No model 'nobody@stable' is registered")
