import numpy as np
import pytest
from harness.small_tokenizers import byte_bpe_json, loaded, wordpiece_json
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.runtime.errors import InvalidInputError
from modelfleet.tokenizer.decoder import decode
from modelfleet.tokenizer.encoder import EncodingOptions, encode


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_bytes_come_back_as_the_text_that_was_encoded(many: list[str]) -> None:
    tokenizer = loaded(byte_bpe_json())
    tokens = encode(tokenizer, many, [], EncodingOptions())

    assert decode(tokenizer, tokens.ids, tokens.lengths, keep_special_tokens=False) == many


def test_special_tokens_are_kept_when_asked_for() -> None:
    tokenizer = loaded(wordpiece_json())
    tokens = encode(tokenizer, ["the cat"], [], EncodingOptions())

    assert decode(tokenizer, tokens.ids, tokens.lengths, keep_special_tokens=True) == ["[CLS] the cat [SEP]"]
    assert decode(tokenizer, tokens.ids, tokens.lengths, keep_special_tokens=False) == ["the cat"]


def test_an_empty_sequence_is_an_empty_text() -> None:
    assert decode(loaded(wordpiece_json()), ints(4), ints(0, 1, 0), keep_special_tokens=False) == ["", "a", ""]


@pytest.mark.parametrize("outside", [-1, loaded(wordpiece_json()).vocabulary_size, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_named(outside: int) -> None:
    tokenizer = loaded(wordpiece_json())

    with pytest.raises(InvalidInputError, match=f"Token id {outside} at position 1 is outside the vocabulary") as error:
        decode(tokenizer, ints(4, outside), ints(2), keep_special_tokens=False)
    assert str(tokenizer.vocabulary_size - 1) in error.value.message


def test_the_last_id_is_inside_the_vocabulary() -> None:
    tokenizer = loaded(wordpiece_json())

    assert decode(tokenizer, ints(tokenizer.vocabulary_size - 1), ints(1), keep_special_tokens=False) == ["😀"]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((1,), "add up to 1, but there are 2"),
        ((3,), "add up to 3"),
        ((3, -1), "lengths has -1"),
        ((2**31 - 1,) * 2, "add up to"),
    ],
)
def test_lengths_that_do_not_fit_the_ids_are_refused(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        decode(loaded(wordpiece_json()), ints(4, 5), ints(*lengths), keep_special_tokens=False)
