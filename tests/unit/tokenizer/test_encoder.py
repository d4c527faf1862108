import threading

import numpy as np
import pytest
from harness.small_tokenizers import byte_bpe_json, digest_of, loaded, wordpiece_json
from hypothesis import assume, given
from hypothesis import strategies as st
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError
from modelfleet.tokenizer.cutting import Truncation
from modelfleet.tokenizer.encoder import EncodingOptions, Tokens, encode
from modelfleet.tokenizer.tokenizers import LoadedTokenizer, load_tokenizer
from tokenizers import Encoding, Tokenizer, models

KINDS = [wordpiece_json(), byte_bpe_json()]

kinds = st.sampled_from(KINDS)
texts = st.text(st.sampled_from("thecaso, .中文😀é"), max_size=60)
directions = st.sampled_from([Truncation.RIGHT, Truncation.LEFT])


def library_windows(
    tokenizer: LoadedTokenizer, text: str, pair: str | None, special_tokens: bool, **truncation: object
) -> list[Encoding]:
    """What the library's own truncation says, on a copy whose settings nobody else sees."""
    copy = Tokenizer.from_str(tokenizer.library.to_str())
    copy.enable_truncation(**truncation)
    encoding = copy.encode(text, pair, add_special_tokens=special_tokens)
    return [encoding, *encoding.overflowing]


def assert_equal(tokens: Tokens, expected: list[Encoding]) -> None:
    assert tokens.lengths.tolist() == [len(encoding) for encoding in expected]
    assert tokens.ids.tolist() == [id_ for encoding in expected for id_ in encoding.ids]
    assert tokens.offsets.reshape(-1, 2).tolist() == [list(span) for encoding in expected for span in encoding.offsets]
    type_ids = [type_id for encoding in expected for type_id in encoding.type_ids]
    assert tokens.type_ids.tolist() == (type_ids if any(type_ids) else [])


@given(kind=kinds, text=texts, pair=st.none() | texts, room=st.integers(1, 40), side=directions, special=st.booleans())
def test_truncation_equals_the_librarys_own(
    *, kind: bytes, text: str, pair: str | None, room: int, side: Truncation, special: bool
) -> None:
    tokenizer = loaded(kind)
    added = (tokenizer.added_to_single if pair is None else tokenizer.added_to_pair) if special else 0
    options = EncodingOptions(room + added, side, special_tokens=special, offsets=True)

    tokens = encode(tokenizer, [text], [] if pair is None else [pair], options)

    expected = library_windows(
        tokenizer, text, pair, special, max_length=room + added, direction=side.name.lower(), strategy="longest_first"
    )
    assert_equal(tokens, expected[:1])
    assert tokens.token_counts.tolist() == [len(tokenizer.library.encode(text, pair, add_special_tokens=special))]


@given(kind=kinds, text=texts, room=st.integers(1, 20), data=st.data(), special=st.booleans())
def test_windows_of_a_text_equal_the_librarys_own(
    kind: bytes, text: str, room: int, data: st.DataObject, special: bool
) -> None:
    tokenizer = loaded(kind)
    max_tokens = room + (tokenizer.added_to_single if special else 0)
    stride = data.draw(st.integers(0, room - 1))
    assume(stride < max_tokens - tokenizer.added_to_single)  # the library asks for this even without special tokens

    tokens = encode(
        tokenizer, [text], [], EncodingOptions(max_tokens, stride=stride, special_tokens=special, offsets=True)
    )

    assert_equal(tokens, library_windows(tokenizer, text, None, special, max_length=max_tokens, stride=stride))


@given(kind=kinds, text=texts, pair=texts, room=st.integers(1, 20), data=st.data())
def test_windows_of_a_pair_repeat_the_first_half_and_equal_the_librarys_own(
    kind: bytes, text: str, pair: str, room: int, data: st.DataObject
) -> None:
    tokenizer = loaded(kind)
    assume(pair)
    whole_first = len(tokenizer.library.encode(text, add_special_tokens=False))
    max_tokens = room + tokenizer.added_to_pair + whole_first
    stride = data.draw(st.integers(0, room - 1))

    tokens = encode(tokenizer, [text], [pair], EncodingOptions(max_tokens, stride=stride, offsets=True))

    assert_equal(
        tokens,
        library_windows(tokenizer, text, pair, True, max_length=max_tokens, stride=stride, strategy="only_second"),
    )


@given(kind=kinds, many=st.lists(texts, min_size=1, max_size=8), max_tokens=st.integers(4, 12))
def test_a_text_is_encoded_alike_whatever_stands_beside_it(kind: bytes, many: list[str], max_tokens: int) -> None:
    tokenizer, options = loaded(kind), EncodingOptions(max_tokens, stride=1, offsets=True)

    together = encode(tokenizer, many, [], options)

    alone = [encode(tokenizer, [text], [], options) for text in many]
    assert together.ids.tolist() == np.concatenate([tokens.ids for tokens in alone]).tolist()
    assert together.lengths.tolist() == np.concatenate([tokens.lengths for tokens in alone]).tolist()
    assert together.offsets.tolist() == np.concatenate([tokens.offsets for tokens in alone]).tolist()
    assert together.token_counts.tolist() == np.concatenate([tokens.token_counts for tokens in alone]).tolist()
    windows = [len(tokens.lengths) for tokens in alone]
    assert together.window_counts.tolist() == (windows if max(windows) > 1 else [])


@pytest.mark.parametrize("kind", KINDS, ids=["wordpiece", "byte-bpe"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("hello 😀 world", id="emoji outside the basic plane"),
        pytest.param("👩‍👩‍👧 hello 🇨🇭 world", id="emoji of several code points"),
        pytest.param("中文hello。world", id="Chinese"),
        pytest.param("cafe\u0301 hello na\u00efve world", id="combining and composed accents"),
        pytest.param("\u00a0hello\u3000\u200bworld\r\n", id="odd spaces"),
    ],
)
def test_offsets_count_code_points_of_the_text_as_sent(kind: bytes, text: str) -> None:
    tokens = encode(loaded(kind), [text], [], EncodingOptions(offsets=True))

    spans = tokens.offsets.reshape(-1, 2)
    assert spans[0].tolist() == spans[-1].tolist() == [0, 0]  # special tokens
    pieces = [text[start:stop].strip() for start, stop in spans[1:-1]]
    covered = "".join(pieces)
    assert "hello" in covered
    assert "world" in covered
    assert spans.max() <= len(text)


def test_offsets_of_an_accent_cover_the_base_and_the_combining_character() -> None:
    tokens = encode(loaded(wordpiece_json()), ["e\u0301a"], [], EncodingOptions(offsets=True))

    assert tokens.offsets.reshape(-1, 2)[1:-1].tolist() in ([[0, 2], [2, 3]], [[0, 1], [2, 3]])


def test_settings_in_the_file_that_pad_or_truncate_are_reset() -> None:
    tokens = encode(loaded(wordpiece_json()), ["the cat sat on the mat the cat sat", "cat"], [], EncodingOptions())

    assert tokens.lengths.tolist() == [11, 3]
    assert tokens.window_counts.tolist() == []


def test_an_empty_text_yields_the_special_tokens_alone() -> None:
    tokens = encode(loaded(wordpiece_json()), [""], [], EncodingOptions(max_tokens=3))

    assert tokens.ids.tolist() == [2, 3]


def test_pairs_have_type_ids_where_the_template_gives_them() -> None:
    options = EncodingOptions()

    wordpiece = encode(loaded(wordpiece_json()), ["the cat"], ["sat"], options)
    byte_bpe = encode(loaded(byte_bpe_json()), ["the cat"], ["sat"], options)

    assert wordpiece.type_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert byte_bpe.type_ids.tolist() == []


def test_forbidden_truncation_names_the_text_its_tokens_and_the_limit() -> None:
    with pytest.raises(InvalidInputError, match=r"texts\[11\] has 6 tokens, more than the 5 allowed") as raised:
        encode(
            loaded(wordpiece_json()),
            ["cat", "the cat sat on"],
            [],
            EncodingOptions(5, Truncation.FORBIDDEN),
            first_index=10,
        )
    assert raised.value.field == "texts[11]"


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        (EncodingOptions(max_tokens=-1), "max_tokens", "max_tokens is -1"),
        (EncodingOptions(max_tokens=2), "max_tokens", "2 special tokens are added. Use at least 3"),
        (EncodingOptions(stride=2), "max_tokens", "windowing needs max_tokens"),
        (EncodingOptions(max_tokens=8, stride=-1), "windowing.stride", "stride is -1"),
        (EncodingOptions(max_tokens=8, stride=6), "windowing.stride", "has room for 6 .* Use at most 5"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: EncodingOptions, field: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as raised:
        encode(loaded(wordpiece_json()), ["cat"], [], options)
    assert raised.value.field == field


def test_a_first_half_that_leaves_no_room_for_windows_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"texts\[1\] has 5 tokens .* leaves 1 for its pair"):
        encode(
            loaded(wordpiece_json()),
            ["cat", "the cat sat on the"],
            ["mat", "cat cat cat"],
            EncodingOptions(9, stride=1),
        )


def test_windows_that_repeat_a_small_text_to_a_gigantic_answer_are_refused() -> None:
    message = r"windowing.stride is 509: the texts have 16002 tokens, .* more than 1048576. Use a smaller stride"
    with pytest.raises(InvalidInputError, match=message) as raised:
        encode(loaded(wordpiece_json()), ["cat " * 16_000], [], EncodingOptions(512, stride=509))
    assert raised.value.field == "windowing.stride"


def test_windows_of_a_large_text_may_share_three_quarters() -> None:
    tokens = encode(loaded(wordpiece_json()), ["cat " * 400_000], [], EncodingOptions(512, stride=382))
    assert len(tokens.ids) > 1 << 20


def test_a_small_text_may_be_repeated_as_often_as_it_likes() -> None:
    tokens = encode(loaded(wordpiece_json()), ["cat " * 2000], [], EncodingOptions(512, stride=509))
    assert len(tokens.lengths) == 2000 - 509


def test_a_tokenizer_that_fails_on_a_text_is_an_invalid_bundle() -> None:
    content = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")).to_str().encode()
    tokenizer = load_tokenizer(digest_of(content), content)

    with pytest.raises(InvalidBundleError, match=r"failed: .*Missing \[UNK\]"):
        encode(tokenizer, ["b"], [], EncodingOptions())


def test_threads_share_a_tokenizer_with_different_options() -> None:
    tokenizer, text = loaded(wordpiece_json()), "the cat sat on the mat " * 20
    expected = {limit: encode(tokenizer, [text], [], EncodingOptions(limit)).ids.tolist() for limit in range(3, 11)}
    wrong: list[int] = []

    def work(limit: int) -> None:
        results = [encode(tokenizer, [text], [], EncodingOptions(limit)).ids.tolist() for _ in range(50)]
        wrong.extend(limit for result in results if result != expected[limit])

    threads = [threading.Thread(target=work, args=(limit,)) for limit in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
