import numpy as np
import pytest
from modelfleet.inference.token_ids import check_token_ids
from modelfleet.inference.tokens import TextUsage, Tokens
from modelfleet.runtime.errors import InvalidInputError


def tokens(
    ids: list[int],
    lengths: list[int],
    *,
    type_ids: list[int] | None = None,
    window_counts: list[int] | None = None,
    token_counts: list[int] | None = None,
) -> Tokens:
    return Tokens(
        ids=np.array(ids, np.int32),
        lengths=np.array(lengths, np.int32),
        type_ids=None if type_ids is None else np.array(type_ids, np.uint8),
        offsets=None,
        window_counts=np.array(window_counts or [1] * len(lengths), np.int32),
        token_counts=np.array(token_counts or lengths, np.int32),
    )


def test_starts_point_at_the_first_token_of_each_window() -> None:
    assert tokens([1, 2, 3, 4, 5, 6], [2, 1, 3]).starts.tolist() == [0, 2, 3, 6]


def test_a_text_with_more_tokens_than_were_kept_was_truncated() -> None:
    usage = tokens([1, 2, 3], [2, 1], token_counts=[9, 1]).usage()
    assert usage == [
        TextUsage(token_count=9, truncated=True, window_count=1),
        TextUsage(token_count=1, truncated=False, window_count=1),
    ]


def test_a_text_that_windows_cover_was_not_truncated() -> None:
    usage = tokens([1, 2, 3, 4], [2, 2, 1], window_counts=[2, 1], token_counts=[3, 1]).usage()
    assert usage == [
        TextUsage(token_count=3, truncated=False, window_count=2),
        TextUsage(token_count=1, truncated=False, window_count=1),
    ]


def test_token_ids_that_fit_the_model_pass() -> None:
    check_token_ids(tokens([0, 9, 3], [2, 1], type_ids=[0, 1, 0]), 4, 10, 2)


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        (tokens([], []), "lengths", "token_ids is empty"),
        (tokens([1], [1, 0]), "lengths", "has the length 0. Give at least one id"),
        (tokens([1], [2, -1]), "lengths", "has the length -1"),
        (tokens([1, 2, 3], [2]), "lengths", "has 3 ids, and lengths that sum to 2"),
        (tokens([1] * 5, [5]), "lengths", "has 5 ids; the model takes at most 4. Cut it"),
        (tokens([1, 10], [2]), "ids", "token id 10 is outside the model's vocabulary, which has 10 ids"),
        (tokens([1, -3], [2]), "ids", "token id -3 is outside"),
        (tokens([1, 2], [2], type_ids=[0]), "type_ids", "has 2 ids and 1 type_ids"),
    ],
)
def test_token_ids_that_cannot_be_run_are_refused(given: Tokens, field: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as raised:
        check_token_ids(given, 4, 10, 2)
    assert raised.value.field == f"token_ids.{field}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tokens([1, 8], [2]), "token id 8 is outside the model's vocabulary, which has 8 ids"),
        (tokens([1, 2], [2], type_ids=[0, 2]), "type id 2 is outside the model's, which are 0 to 1"),
    ],
)
def test_what_the_graph_has_no_vectors_of_is_refused(given: Tokens, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_token_ids(given, 4, 8, 2)


def test_without_a_known_vocabulary_only_negative_ids_are_refused() -> None:
    check_token_ids(tokens([1_000_000], [1]), 4, None, None)
    with pytest.raises(InvalidInputError, match="which has no negative ids"):
        check_token_ids(tokens([-1], [1]), 4, None, None)
