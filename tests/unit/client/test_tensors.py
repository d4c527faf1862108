import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.client.tensors import infer_outputs, infer_request
from modelfleet.runtime.errors import InvalidInputError

DTYPES = [np.bool_, *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))]
DTYPES += ["float16", "float32", "float64"]
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def echoed(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """What a model that returns its inputs answers."""
    response = pb.ModelInferResponse(raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return response


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES)))
def test_numbers_come_back_with_their_type_and_shape(array: npt.NDArray[np.generic]) -> None:
    outputs = infer_outputs(echoed(infer_request("m", "", {"x": array})))

    assert outputs["x"].dtype == array.dtype
    assert outputs["x"].shape == array.shape
    assert outputs["x"].tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=6))
def test_bytes_come_back_whatever_is_in_them(elements: list[bytes]) -> None:
    array = np.array([*elements, None], object)[:-1]  # numpy would cut trailing zeros of its own type for bytes

    assert infer_outputs(echoed(infer_request("m", "", {"x": array})))["x"].tolist() == elements


@pytest.mark.parametrize("array", [np.array(["é", "b"]), np.array(["é", "b"], object)])
def test_texts_travel_as_utf_8(array: npt.NDArray[np.generic]) -> None:
    request = infer_request("m", "", {"x": array})

    assert request.inputs[0].datatype == "BYTES"
    assert request.raw_input_contents[0] == b"\x02\0\0\0\xc3\xa9\x01\0\0\0b"


@pytest.mark.parametrize("array", [np.array([[1, 2], [3, 4]], ">i4"), np.array([[1, 2], [3, 4]], "<i4", order="F")])
def test_other_orders_of_bytes_and_axes_are_put_right(array: npt.NDArray[np.int32]) -> None:
    assert infer_request("m", "", {"x": array}).raw_input_contents[0] == np.array([1, 2, 3, 4], "<i4").tobytes()


def test_half_precision_of_brains_is_widened() -> None:
    response = pb.ModelInferResponse(raw_output_contents=[b"\x80\x3f\x00\xc0"])
    response.outputs.add(name="y", datatype="BF16", shape=[2])

    assert infer_outputs(response)["y"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("datatype", "contents", "expected"),
    [
        ("FP32", {"fp32_contents": [1.5, 2.5]}, [[1.5, 2.5]]),
        ("INT8", {"int_contents": [-1, 2]}, [[-1, 2]]),
        ("BOOL", {"bool_contents": [True, False]}, [[True, False]]),
        ("BYTES", {"bytes_contents": [b"a", b"\0"]}, [[b"a", b"\0"]]),
    ],
)
def test_contents_that_are_not_raw_are_read_too(datatype: str, contents: dict[str, list], expected: list) -> None:
    response = pb.ModelInferResponse()
    response.outputs.add(name="y", datatype=datatype, shape=[1, 2], contents=pb.InferTensorContents(**contents))

    assert infer_outputs(response)["y"].tolist() == expected


@pytest.mark.parametrize("array", [np.array(["2020-01-01"], "datetime64[D]"), np.array([1j])])
def test_a_dtype_that_the_protocol_has_not_is_refused_by_name(array: npt.NDArray[np.generic]) -> None:
    with pytest.raises(InvalidInputError, match=f"'x' has the dtype {array.dtype}".replace("[", r"\[")) as caught:
        infer_request("m", "", {"x": array})

    assert caught.value.field == "x"


def test_objects_that_are_no_texts_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="not 1"):
        infer_request("m", "", {"x": np.array([1, "a"], object)})
