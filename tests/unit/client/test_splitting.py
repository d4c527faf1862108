import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.client.splitting import MAX_TEXT_BYTES, parts, text_list, text_sizes
from modelfleet.runtime.errors import InvalidInputError


@given(st.lists(st.integers(0, 20)), st.integers(1, 30), st.integers(1, 5))
def test_parts_cover_all_items_in_order_within_both_limits(sizes: list[int], max_bytes: int, max_items: int) -> None:
    found = parts(sizes, max_bytes, max_items)

    assert [index for part in found for index in range(len(sizes))[part]] == list(range(len(sizes)))
    for part in found:
        held = sizes[part]
        assert len(held) <= max_items
        assert len(held) <= 1 or sum(held) <= max_bytes


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(1, 30), st.integers(1, 5))
def test_no_two_neighbours_would_have_fitted_into_one(sizes: list[int], max_bytes: int, max_items: int) -> None:
    found = parts(sizes, max_bytes, max_items)

    for left, right in itertools.pairwise(found):
        grown = sizes[left.start : right.start + 1]
        assert len(grown) > max_items or sum(grown) > max_bytes


def test_no_items_still_make_a_part_for_the_server_to_refuse() -> None:
    assert parts([]) == [slice(0, 0)]


def test_sizes_are_those_of_utf_8() -> None:
    assert text_sizes(["", "a", "é", "😀"], "texts") == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("texts", "field", "message"),
    [
        ("one text", "texts", "one string, not a list"),
        ({"a", "b"}, "texts", "of the type set, not a list of strings. Answers come in the order of a list"),
        ({"a": "b"}, "texts", "of the type dict, not a list"),
        (b"one text", "texts", "of the type bytes, not a list"),
        (7, "texts", "of the type int, not a list"),
        (["a", 7], "texts[1]", "type int"),
        (["a", "b\ud800"], "texts[1]", "surrogate pair at character 1"),
        (["x" * (MAX_TEXT_BYTES + 1)], "texts[0]", "more than the"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_index(texts: list[str], field: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        text_sizes(text_list(texts, "texts"), "texts")

    assert caught.value.field == field
