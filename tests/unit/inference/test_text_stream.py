import pytest
from harness.small_tokenizers import byte_bpe_json
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.inference.generation.text_stream import StopStrings, TextStream
from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_buffer(byte_bpe_json())

# Few letters, so that stop strings and their beginnings are frequent.
letters = st.text("ab<", max_size=30)
stop_lists = st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Where a reader who reads character by character would stop."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pieces_of(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(letters, stop_lists, st.lists(st.integers(0, 5), max_size=10))
def test_a_text_is_cut_exactly_before_a_stop_string_however_it_arrives(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    stream, said, stop = StopStrings(stops), "", None
    for piece in pieces_of(text, sizes):
        found = stream.add(piece)
        said += found.text
        if found.stop is not None:
            stop = found.stop
            break
    else:
        said += stream.rest()

    assert (said, stop) == cut(text, stops)


@given(letters, stop_lists)
def test_nothing_that_was_said_can_still_become_part_of_a_stop_string(text: str, stops: list[str]) -> None:
    stream, said = StopStrings(stops), ""
    for character in text:
        found = stream.add(character)
        said += found.text
        if found.stop is not None:
            break

    assert all(stop not in said for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["</s>"])

    assert [stream.add(piece).text for piece in ("Hello", "<", "/b", ">")] == ["Hello", "", "</b", ">"]


def streamed(ids: list[int], sizes: list[int], prompt: list[int], stops: list[str] | None = None) -> list[str]:
    """Decode ids as they arrive in groups of `sizes`, as the tokenizer service would."""
    stream = TextStream(StopStrings(stops or []), list(prompt))
    groups = []
    for size in sizes:
        groups.append(ids[:size])
        ids = ids[size:]
    texts = []
    for index, group in enumerate([*groups, ids]):
        known, whole = (TOKENIZER.decode(window) for window in stream.windows(group))
        texts.append(stream.advance(known, whole, last=index == len(groups)).text)
    return texts


texts = st.text(st.sampled_from("ab é你好😀👩‍🔬 "), max_size=12)
sizes_lists = st.lists(st.integers(1, 4), max_size=8)


@given(texts, sizes_lists, texts)
def test_the_pieces_make_up_the_text_and_none_ends_within_a_character(text: str, sizes: list[int], prompt: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    before = TOKENIZER.encode(prompt, add_special_tokens=False).ids[-4:]
    # The prompt's own last character must be whole, or the text would begin within it.
    before = before if "\ufffd" not in TOKENIZER.decode(before) else []

    found = streamed(ids, sizes, before)

    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)


@given(st.binary(max_size=12), sizes_lists)
def test_bytes_that_are_no_text_end_and_hold_up_nothing(garbage: bytes, sizes: list[int]) -> None:
    alphabet = sorted(TOKENIZER.get_vocab().items(), key=lambda entry: entry[1])[2:258]
    ids = [alphabet[byte][1] for byte in garbage]

    found = "".join(streamed(ids, sizes, []))

    whole = TOKENIZER.decode(ids)
    assert whole.startswith(found)
    assert len(whole) - len(found) <= 3  # at most the beginning of a character is dropped at the end


@pytest.mark.parametrize("sizes", [[1] * 20, [4], [7, 7], [20]])
def test_half_a_character_at_the_end_is_dropped(sizes: list[int]) -> None:
    ids = TOKENIZER.encode("cat 🦖", add_special_tokens=False).ids[:-1]

    assert "".join(streamed(ids, sizes, [])) == "cat "
