import numpy as np
import pytest
from modelfleet.inference.tasks import tensors
from modelfleet.inference.tensor_spec import TensorSpec
from modelfleet.runtime.errors import InvalidInputError

FLOATS = TensorSpec("x", np.dtype(np.float32), (None, 3))
COUNTS = TensorSpec("n", np.dtype(np.int64), (None,))


def check(inputs: dict[str, np.ndarray], *, batches: bool = True, nan: bool = False) -> tuple[int, object]:
    return tensors.check(inputs, [FLOATS, COUNTS], batches=batches, nan=nan)


def inputs(rows: int = 2, **others: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": np.zeros((rows, 3), np.float32), "n": np.zeros(rows, np.int64), **others}


def test_the_first_dimension_counts_rows() -> None:
    assert check(inputs(rows=5))[0] == 5
    assert check(inputs(rows=5), batches=False) == (1, None)


def test_requests_whose_other_dimensions_are_equal_may_share_a_batch() -> None:
    anything = TensorSpec("x", np.dtype(np.float32), (None, None))

    def key(*shape: int) -> object:
        return tensors.check({"x": np.zeros(shape, np.float32)}, [anything], batches=True, nan=False)[1]

    assert key(1, 3) == key(7, 3)
    assert key(1, 3) != key(1, 4)


NAN = np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": np.zeros(2)}, r"no input 'y'. Its inputs are n, x"),
        ({"x": np.zeros((2, 3), np.float64)}, r"'x' has the dtype float64. It is float32 \[any, 3\]"),
        ({"x": np.zeros((2, 4), np.float32)}, r"'x' has the shape \[2, 4\]. It is float32 \[any, 3\]"),
        ({"x": np.zeros(3, np.float32)}, r"'x' has the shape \[3\]"),
        ({"x": np.zeros((1, 3), np.float32)}, r"first dimensions differ: \{'x': 1, 'n': 2\}"),
        ({"x": NAN}, r"'x' is NaN at \[1, 1\]"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(given: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as raised:
        check(inputs(**given))
    assert raised.value.field == "inputs"


def test_a_missing_input_is_named_with_what_it_is() -> None:
    with pytest.raises(InvalidInputError, match=r"'n' is missing. It is int64 \[any\]"):
        check({"x": np.zeros((2, 3), np.float32)})


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="first dimension is 0"):
        check(inputs(rows=0))


def test_nan_is_let_through_where_the_manifest_allows_it() -> None:
    assert check(inputs(x=NAN), nan=True)[0] == 2


def test_rows_are_joined_in_order() -> None:
    rows = [[np.array([[1]]), np.array([5])], [np.array([[2]]), np.array([6])]]
    joined = tensors.joined(rows, ["a", "b"])
    assert {name: array.tolist() for name, array in joined.items()} == {"a": [[1], [2]], "b": [5, 6]}
