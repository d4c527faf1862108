"""Of what a request of the Open Inference Protocol says beside its tensors nothing is ignored."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode
from harness import graphs
from harness.worker import Worker, refused, running_worker, still_embeds
from modelfleet.api.inference.v1 import inference_pb2
from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.bundle.manifest import Task

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = StatusCode.INVALID_ARGUMENT
LONG = "the cat sat on the mat " * 5
MODELS = {
    "embedder@1": graphs.text_bundle(graphs.embedder(), Task.EMBED),
    "classifier@1": graphs.text_bundle(graphs.classifier(), Task.CLASSIFY),
    "labeller@1": graphs.text_bundle(graphs.labeller(), Task.ENTITIES),
    "reranker@1": graphs.text_bundle(graphs.cross_encoder(), Task.RERANK),
    "affine@1": graphs.tensor_bundle(graphs.affine()),
    "labelled@1": graphs.tensor_bundle(graphs.affine(), labels=("a", "b", "c")),
    "fixed@1": graphs.tensor_bundle(graphs.fixed_batch()),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    async with running_worker(tmp_path_factory.mktemp("worker")) as worker:
        await worker.serve(MODELS)
        yield worker


def parameter(value: Any) -> pb.InferParameter:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return pb.InferParameter(**{kinds[type(value)]: value})


def of_texts(model: str, *texts: str, **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    inputs = {"documents": texts, "query": ["cat"]} if model == "reranker" else {"text": texts}
    for name, values in inputs.items():
        contents = pb.InferTensorContents(bytes_contents=[value.encode() for value in values])
        request.inputs.add(name=name, datatype="BYTES", shape=[len(values)], contents=contents)
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(parameter(value))
    return request


def of_numbers(model: str = "affine", rows: int = 1, **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    contents = pb.InferTensorContents(fp32_contents=[3, 1, 2] * rows)
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 3], contents=contents)
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(parameter(value))
    return request


def numbers(answer: pb.ModelInferResponse) -> np.ndarray:
    (output,) = answer.outputs[:1]
    return np.array(output.contents.fp32_contents, np.float32).reshape(output.shape)


async def test_a_long_text_is_refused_unless_it_is_said_what_to_do_with_it(worker: Worker) -> None:
    message = r"texts\[1\] has 32 tokens, more than the 16 allowed, and truncation is forbidden"
    await refused(
        worker, worker.open_inference.ModelInfer(of_texts("embedder", "cat", LONG)), INVALID, message, field="texts[1]"
    )


@pytest.mark.parametrize(
    ("parameters", "native", "truncated"),
    [
        ({"truncation": "right"}, {"truncation": tokenizer_pb2.TRUNCATION_RIGHT}, True),
        ({"truncation": "left"}, {"truncation": tokenizer_pb2.TRUNCATION_LEFT}, True),
        ({"window_stride": 2}, {"windowing": tokenizer_pb2.Windowing(stride=2)}, False),
        ({"truncation": "right", "dimensions": 2}, {"dimensions": 2}, True),
        ({"truncation": "right", "normalize": True}, {"normalize": True}, True),
    ],
)
async def test_texts_are_answered_as_by_the_calls_of_their_own(
    worker: Worker, parameters: dict[str, Any], native: dict[str, Any], truncated: bool
) -> None:
    answer = await worker.open_inference.ModelInfer(of_texts("embedder", "the cat", LONG, **parameters))

    own = await worker.inference.Embed(inference_pb2.EmbedRequest(model="embedder", texts=["the cat", LONG], **native))
    np.testing.assert_allclose(numbers(answer).ravel(), np.frombuffer(own.vectors, "<f4"), atol=1e-6)
    told = {name: json.loads(value.string_param) for name, value in answer.parameters.items()}
    assert told == {
        "token_counts": [usage.token_count for usage in own.usage],
        "truncated": [False, truncated],
        "window_counts": [usage.window_count for usage in own.usage],
    }


async def test_each_task_takes_its_own_parameters(worker: Worker) -> None:
    infer = worker.open_inference.ModelInfer

    labels = await infer(of_texts("classifier", "the cat", top_k=1))
    assert list(labels.outputs[0].shape) == [1, 1]

    entities = await infer(of_texts("labeller", "the cat on the mat", min_score=1))
    assert entities.outputs[0].contents.bytes_contents == [b"[]"]

    documents = ["the mat", "cat cat cat cat"]
    raw = numbers(await infer(of_texts("reranker", *documents, raw_scores=True)))
    sigmoid = numbers(await infer(of_texts("reranker", *documents)))
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-raw)), atol=1e-6)


async def test_a_timeout_is_a_deadline(worker: Worker) -> None:
    await worker.open_inference.ModelInfer(of_numbers(timeout=60_000_000, priority=0))
    call = worker.open_inference.ModelInfer(of_numbers(timeout=1))
    await refused(worker, call, StatusCode.DEADLINE_EXCEEDED, "deadline passed")


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            of_texts("embedder", "a", foo=1),
            "'foo' of a request to a model of the task 'embed' is not known. There are trunc",
        ),
        (of_texts("embedder", "a", raw_scores=True), "'raw_scores' .* is not known"),
        (of_texts("embedder", "a", top_k=3), "'top_k' .* is not known"),
        (
            of_texts("embedder", "a", normalize=1),
            "'normalize' is given as int64_param. It is true or false: bool_param",
        ),
        (of_texts("embedder", "a", truncation=True), "'truncation' is given as bool_param. It is a string"),
        (of_texts("embedder", "a", truncation="middle"), "'truncation' is 'middle'. Use one of forbidden, right, left"),
        (of_texts("embedder", "a", truncation="left", window_stride=2), "Both truncation and window_stride are given"),
        (of_numbers(truncation="left"), "'truncation' of a request to a model of the task 'tensor' is not known"),
        (of_numbers(sequence_id=7), "'sequence_id' .* is of a sequence, which this server does not keep"),
        (of_numbers(sequence_start=True), "'sequence_start' .* is of a sequence"),
        (of_numbers(priority=2), "'priority' is 2"),
        (of_numbers(timeout=0), "'timeout' is 0 microseconds"),
    ],
)
async def test_a_parameter_that_is_not_honoured_is_refused(
    worker: Worker, request_: pb.ModelInferRequest, says: str
) -> None:
    await refused(worker, worker.open_inference.ModelInfer(request_), INVALID, says, field="parameters")
    await still_embeds(worker)


def with_input_parameter(name: str, value: Any) -> pb.ModelInferRequest:
    request = of_numbers()
    request.inputs[0].parameters[name].CopyFrom(parameter(value))
    return request


def asking(model: str = "affine", rows: int = 1, /, name: str = "y", **parameters: Any) -> pb.ModelInferRequest:
    request = of_numbers(model, rows)
    output = request.outputs.add(name=name)
    for key, value in parameters.items():
        output.parameters[key].CopyFrom(parameter(value))
    return request


def twice() -> pb.ModelInferRequest:
    request = asking()
    request.outputs.add(name="y")
    return request


def in_both_ways() -> pb.ModelInferRequest:
    request = of_numbers()
    request.raw_input_contents.append(np.ones(3, np.float32).tobytes())
    return request


def text_and_more() -> pb.ModelInferRequest:
    request = of_texts("embedder", "a")
    request.inputs.add(name="texts", datatype="BYTES", shape=[0])
    return request


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (with_input_parameter("shared_memory_region", "in0"), "parameters", "is in shared memory"),
        (
            with_input_parameter("binary_data_size", 12),
            "parameters",
            "'binary_data_size' of the input 'x' is not known",
        ),
        (asking(shared_memory_region="out0"), "parameters", "of the output 'y' .* is in shared memory"),
        (asking(binary_data=True), "parameters", "'binary_data' of the output 'y' is not known. There are classific"),
        (asking(classification=0), "outputs", "classification of the output 'y' is 0"),
        (asking(classification="2"), "parameters", "'classification' is given as string_param"),
        (asking("embedder"), "outputs", "has no output 'y'"),
        (twice(), "outputs", "'y' is asked for twice"),
        (in_both_ways(), "inputs", "'x' has contents beside raw_input_contents"),
        (text_and_more(), "inputs", "has no input 'texts'. Its inputs are text"),
    ],
)
async def test_what_is_said_of_a_tensor_and_not_honoured_is_refused(
    worker: Worker, request_: pb.ModelInferRequest, field: str, says: str
) -> None:
    await refused(worker, worker.open_inference.ModelInfer(request_), INVALID, says, field=field)


@pytest.mark.parametrize(
    ("request_", "shape", "expected"),
    [
        (asking(classification=2), [1, 2], [b"7.000000:0", b"5.000000:2"]),
        (asking("labelled", 2, classification=1), [2, 1], [b"7.000000:0:a"] * 2),
        (asking(classification=99), [1, 3], [b"7.000000:0", b"5.000000:2", b"3.000000:1"]),
        (asking("fixed", 2, classification=1), [1], [b"3.000000:0"]),
    ],
)
async def test_classes_are_answered_in_place_of_numbers(
    worker: Worker, request_: pb.ModelInferRequest, shape: list[int], expected: list[bytes]
) -> None:
    answer = await worker.open_inference.ModelInfer(request_)

    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", shape)
    assert list(output.contents.bytes_contents) == expected


async def test_classes_of_a_text_model_are_refused_with_the_way_to_ask(worker: Worker) -> None:
    request = of_texts("classifier", "the cat")
    request.outputs.add(name="scores").parameters["classification"].int64_param = 1
    await refused(
        worker, worker.open_inference.ModelInfer(request), INVALID, "take the parameter top_k", field="outputs"
    )


async def test_an_output_of_text_has_no_numbers_to_classify_by(worker: Worker) -> None:
    request = of_texts("labeller", "the cat")
    request.outputs.add(name="entities").parameters["classification"].int64_param = 1
    with pytest.raises(grpc.aio.AioRpcError, match="is not classified again"):
        await worker.open_inference.ModelInfer(request)


# A field of the protocol that is added to the contract is to be honoured or refused, with a test here or beside.
DECIDED = {
    "ModelInferRequest": {"model_name", "model_version", "id", "parameters", "inputs", "outputs", "raw_input_contents"},
    "InferInputTensor": {"name", "datatype", "shape", "parameters", "contents"},
    "InferRequestedOutputTensor": {"name", "parameters"},
}


async def test_every_field_of_a_request_has_been_decided_on() -> None:
    request = pb.ModelInferRequest.DESCRIPTOR
    found = {message.name: {field.name for field in message.fields} for message in (request, *request.nested_types)}
    assert {name: fields for name, fields in found.items() if not name.endswith("Entry")} == DECIDED
