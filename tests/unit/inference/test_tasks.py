import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from modelfleet.bundle.manifest import Activation, Pooling
from modelfleet.inference.tasks import classify, embed, rerank, windows

finite = st.floats(-100, 100, width=32)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw an output [rows, tokens, dimensions] and the rows' lengths."""
    rows, tokens, dimensions = (draw(st.integers(1, 5)) for _ in range(3))
    output = draw(nps.arrays(np.float32, (rows, tokens, dimensions), elements=finite))
    lengths = draw(nps.arrays(np.int64, rows, elements=st.integers(1, tokens)))
    return output, lengths


@given(outputs())
def test_pooling_reads_only_the_tokens_that_are_no_padding(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    output, lengths = drawn
    rows = [row[:length] for row, length in zip(output, lengths, strict=True)]
    naive = {
        Pooling.MEAN: [row.mean(axis=0, dtype=np.float64) for row in rows],
        Pooling.CLS: [row[0] for row in rows],
        Pooling.LAST: [row[-1] for row in rows],
        Pooling.MAX: [row.max(axis=0) for row in rows],
        Pooling.WEIGHTED_MEAN: [np.average(row, axis=0, weights=np.arange(1, len(row) + 1)) for row in rows],
        Pooling.MEAN_SQRT_LENGTH: [row.sum(axis=0, dtype=np.float64) / len(row) ** 0.5 for row in rows],
    }
    assert {*naive, Pooling.MODEL} == set(Pooling)
    for pooling, expected in naive.items():
        np.testing.assert_allclose(embed.pool(output, lengths, pooling), expected, rtol=1e-4, atol=1e-4)


def test_what_the_graph_has_pooled_stays_as_it_is() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert embed.pool(vectors, np.array([1, 2, 3]), Pooling.MODEL) is vectors


def assembled(vectors: list[list[float]], *, dimensions: int = 0, normalize: bool = False) -> list[list[float]]:
    counts = np.ones(len(vectors), np.int32)
    made = embed.assemble(np.array(vectors, np.float32), counts, counts, dimensions=dimensions, normalize=normalize)
    assert made.dtype == np.dtype("<f4")
    assert made.flags.c_contiguous
    return made.tolist()


def test_leading_dimensions_are_kept_before_normalizing() -> None:
    assert assembled([[3, 4, 100]], dimensions=2) == [[3, 4]]
    assert assembled([[3, 4, 100]], dimensions=2, normalize=True) == [pytest.approx([0.6, 0.8])]


def test_a_zero_vector_stays_zero_when_normalized() -> None:
    assert assembled([[0, 0], [0, 2]], normalize=True) == [[0, 0], [0, 1]]


def test_windows_weigh_by_their_tokens() -> None:
    rows = np.array([[1.0], [4.0], [10.0]], np.float32)
    lengths, counts = np.array([2, 1, 5], np.int32), np.array([2, 1], np.int32)
    assert windows.weighted_mean(rows, lengths, counts).tolist() == [[2.0], [10.0]]


def test_the_best_window_stands_for_a_text() -> None:
    rows = np.array([[1.0], [4.0], [-3.0]], np.float32)
    assert windows.best(rows, np.array([2, 1], np.int32)).tolist() == [[4.0], [-3.0]]


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=6), data=st.data())
def test_windows_are_reduced_text_by_text(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    rows = data.draw(nps.arrays(np.float32, (total, 2), elements=finite))
    lengths = data.draw(nps.arrays(np.int32, total, elements=st.integers(1, 9)))
    parts = np.split(np.arange(total), np.cumsum(counts)[:-1])
    window_counts = np.array(counts, np.int32)
    assert windows.first_windows(window_counts).tolist() == [part[0] for part in parts]
    means = [np.average(rows[part].astype(np.float64), axis=0, weights=lengths[part]) for part in parts]
    np.testing.assert_allclose(windows.weighted_mean(rows, lengths, window_counts), means, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(windows.best(rows, window_counts), [rows[part].max(axis=0) for part in parts])


shapes = nps.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5)
logits = nps.arrays(np.float32, shapes, elements=st.floats(-1e4, 1e4, width=32))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(logits)
def test_softmax_is_a_distribution_at_any_size_of_logits(logits: np.ndarray) -> None:
    probabilities = classify.activate(logits, Activation.SOFTMAX)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    of_best = np.take_along_axis(probabilities, logits.argmax(axis=-1)[..., None], axis=-1)
    np.testing.assert_array_equal(of_best, probabilities.max(axis=-1, keepdims=True))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(logits)
def test_sigmoid_lies_between_0_and_1_at_any_size_of_logits(logits: np.ndarray) -> None:
    probabilities = classify.activate(logits, Activation.SIGMOID)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits.clip(-80, 80).astype(np.float64))), atol=1e-6)


@given(st.floats(-80, 80, width=32))
def test_small_probabilities_are_as_exact_as_large_ones(logit: float) -> None:
    exact = 1 / (1 + np.exp(-np.float64(logit)))
    assert classify.sigmoid(np.array([logit], np.float32))[0] == pytest.approx(exact, rel=1e-5)


def test_labels_come_by_falling_score_and_equal_ones_in_order() -> None:
    probabilities = np.array([0.25, 0.5, 0.25], np.float32)
    ranked = classify.ranked(probabilities, ["a", "b", "c"], 0)
    assert [(one.label, one.score) for one in ranked] == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    assert [one.label for one in classify.ranked(probabilities, ["a", "b", "c"], 2)] == ["b", "a"]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([[1.0], [2.0]], [[1.0], [2.0]]),
        ([1.0, 2.0], [[1.0], [2.0]]),
        ([[1.0, 4.0], [2.0, 1.0]], [[3.0], [-1.0]]),  # (irrelevant, relevant)
    ],
)
def test_relevance_is_read_from_every_form_of_output(output: list[object], expected: list[list[float]]) -> None:
    assert rerank.logit(np.array(output, np.float32)).tolist() == expected


def test_documents_come_by_falling_score_and_equal_ones_in_order_of_the_request() -> None:
    logits = np.array([0.0, 2.0, 0.0, 2.0], np.float32)
    ranked = rerank.ranked(logits, raw=True, top_k=0)
    assert [(one.index, one.score) for one in ranked] == [(1, 2.0), (3, 2.0), (0, 0.0), (2, 0.0)]
    assert [one.index for one in rerank.ranked(logits, raw=True, top_k=3)] == [1, 3, 0]


def test_scores_that_the_sigmoid_cannot_tell_apart_are_ordered_by_their_logits() -> None:
    ranked = rerank.ranked(np.array([50.0, 90.0], np.float32), raw=False, top_k=0)
    assert [(one.index, one.score) for one in ranked] == [(1, 1.0), (0, 1.0)]
