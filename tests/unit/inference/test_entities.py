import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.inference.tasks.entities import Entity, LabelledWindow, extract

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def window(*tokens: tuple[str, int, int], labels: tuple[str, ...] = LABELS) -> LabelledWindow:
    """Make a window of tokens that have a label with probability 0.9 each, and a span."""
    probabilities = np.full((len(tokens), len(labels)), 0.1 / len(labels), np.float32)
    for row, (label, _, _) in enumerate(tokens):
        probabilities[row, labels.index(label)] = 0.9
    offsets = np.array([(start, end) for _, start, end in tokens], np.int32).reshape(-1, 2)
    return LabelledWindow(probabilities, offsets)


def spans(text: str, *windows: LabelledWindow, min_score: float = 0.0) -> list[tuple[str, str]]:
    return [(entity.label, entity.text) for entity in extract(text, windows, LABELS, min_score)]


def test_an_entity_is_begun_by_b_and_continued_by_i() -> None:
    found = extract("Ada Byron is", [window(("B-PER", 0, 3), ("I-PER", 4, 9), ("O", 10, 12))], LABELS, 0.0)
    assert found == [Entity("PER", "Ada Byron", 0, 9, pytest.approx(0.9))]


def test_pieces_of_a_word_that_each_begin_are_one_entity() -> None:
    assert spans("Ludwigsburg", window(("B-LOC", 0, 6), ("B-LOC", 6, 7), ("I-LOC", 7, 11))) == [("LOC", "Ludwigsburg")]


def test_words_that_each_begin_are_two_entities() -> None:
    assert spans("Ada Bob", window(("B-PER", 0, 3), ("B-PER", 4, 7))) == [("PER", "Ada"), ("PER", "Bob")]


def test_a_continuation_without_a_beginning_begins() -> None:
    assert spans("in Ada B", window(("O", 0, 2), ("I-PER", 3, 6), ("I-PER", 7, 8))) == [("PER", "Ada B")]


def test_a_continuation_after_a_token_outside_begins_anew() -> None:
    assert spans("A x B", window(("B-PER", 0, 1), ("O", 2, 3), ("I-PER", 4, 5))) == [("PER", "A"), ("PER", "B")]


def test_a_continuation_of_another_type_begins_anew() -> None:
    assert spans("Ada Rome", window(("B-PER", 0, 3), ("I-LOC", 4, 8))) == [("PER", "Ada"), ("LOC", "Rome")]


def test_labels_without_prefix_are_types_of_their_own() -> None:
    labels = ("O", "PER", "LOC")
    tokens = window(("PER", 0, 3), ("PER", 4, 5), ("O", 6, 8), ("LOC", 9, 13), labels=labels)
    found = extract("Ada B in Rome", [tokens], labels, 0.0)
    assert [(entity.label, entity.text) for entity in found] == [("PER", "Ada B"), ("LOC", "Rome")]


BIOES = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "M-PER", "L-PER", "U-PER")


@pytest.mark.parametrize("labels", [("B-PER", "E-PER"), ("B-PER", "L-PER"), ("B-PER", "I-PER"), ("I-PER", "I-PER")])
def test_an_entity_is_continued_and_ended_in_any_scheme(labels: tuple[str, str]) -> None:
    tokens = window((labels[0], 0, 4), (labels[1], 5, 10), ("O", 11, 16), labels=BIOES)
    found = extract("John Smith lives", [tokens], BIOES, 0.0)
    assert [(entity.label, entity.text) for entity in found] == [("PER", "John Smith")]


@pytest.mark.parametrize(
    "labels", [("S-PER", "S-PER"), ("U-PER", "U-PER"), ("E-PER", "E-PER"), ("E-PER", "I-PER"), ("B-PER", "S-PER")]
)
def test_what_has_ended_is_not_continued_by_another_word(labels: tuple[str, str]) -> None:
    tokens = window((labels[0], 0, 3), (labels[1], 4, 7), labels=BIOES)
    assert [entity.text for entity in extract("Ada Bob", [tokens], BIOES, 0.0)] == ["Ada", "Bob"]


def test_names_that_touch_in_a_script_without_blanks_are_told_apart_by_their_labels() -> None:
    text = "张三李四来"
    tokens = window(*((label, at, at + 1) for at, label in enumerate(("B-PER", "I-PER", "B-PER", "I-PER", "O"))))
    assert spans(text, tokens) == [("PER", "张三"), ("PER", "李四")]


def test_labels_with_hyphens_of_their_own_are_kept_as_they_are() -> None:
    labels = ("O", "credit-card", "E-mail", "I-SSN", "B-SSN")
    tokens = window(("credit-card", 0, 4), ("O", 5, 6), ("E-mail", 7, 10), ("B-SSN", 11, 12), labels=labels)
    found = extract("4111 , a@b 7", [tokens], labels, 0.0)
    assert [(entity.label, entity.text) for entity in found] == [
        ("credit-card", "4111"),
        ("E-mail", "a@b"),
        ("SSN", "7"),
    ]


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=8))
def test_the_schemes_say_the_same(runs: list[tuple[int, bool]]) -> None:
    """Runs of words, each an entity or outside: every scheme leads to exactly these."""
    text = " ".join("ab" for words, _ in runs for _ in range(words))
    ends = np.cumsum([words for words, _ in runs]).tolist()
    expected = [text[3 * (end - words) : 3 * end - 1] for end, (words, named) in zip(ends, runs, strict=True) if named]
    labels = ("O", *(f"{prefix}-X" for prefix in "BIESLUM"))
    for begin, inside, end, single in ("BIIB", "BIES", "BILU", "BMES"):
        written = [
            f"{prefix}-X" if named else "O"
            for words, named in runs
            for prefix in (single if words == 1 else begin + inside * (words - 2) + end)
        ]
        tokens = window(*((label, 3 * at, 3 * at + 2) for at, label in enumerate(written)), labels=labels)
        assert [entity.text for entity in extract(text, [tokens], labels, 0.0)] == expected


@given(st.lists(st.tuples(st.sampled_from(["a", "bc", "张", "😀"]), st.sampled_from(LABELS)), min_size=1, max_size=20))
def test_it_does_not_matter_whether_blanks_are_counted_to_words(words: list[tuple[str, str]]) -> None:
    text, bare, blank = "", [], []
    for word, label in words:
        start = len(text)
        text += f" {word}"
        bare.append((label, start + 1, len(text)))
        blank.append((label, start, len(text)))
    assert extract(text, [window(*blank)], LABELS, 0.0) == extract(text, [window(*bare)], LABELS, 0.0)


def test_blanks_that_a_tokenizer_counts_to_a_word_are_no_part_of_it() -> None:
    assert spans("in Paris", window(("O", 0, 2), ("B-LOC", 2, 8))) == [("LOC", "Paris")]
    assert spans("Berlin Paris", window(("B-LOC", 0, 6), ("B-LOC", 6, 12))) == [("LOC", "Berlin"), ("LOC", "Paris")]
    assert spans("Ada Byron", window(("B-PER", 0, 4), ("I-PER", 4, 9))) == [("PER", "Ada Byron")]


def test_a_token_of_blanks_alone_is_not_read() -> None:
    tokens = window(("B-PER", 0, 3), ("O", 3, 4), ("I-PER", 4, 9), ("B-LOC", 9, 10))
    assert spans("Ada Byron ", tokens) == [("PER", "Ada Byron")]


def test_offsets_are_characters_also_beyond_the_basic_plane() -> None:
    text = "😀👩‍👩‍👧 张三"
    start = text.index("张")
    tokens = window(("O", 0, 1), ("B-PER", start, start + 1), ("I-PER", start + 1, start + 2))
    found = extract(text, [tokens], LABELS, 0.0)
    assert [(entity.text, entity.start, entity.end) for entity in found] == [("张三", start, start + 2)]


def test_pieces_of_one_character_are_one_entity() -> None:
    assert spans("x😀", window(("O", 0, 1), ("B-PER", 1, 2), ("I-PER", 1, 2), ("I-PER", 1, 2))) == [("PER", "😀")]


def test_special_tokens_are_not_read() -> None:
    assert spans("Ada", window(("B-LOC", 0, 0), ("B-PER", 0, 3), ("I-PER", 0, 0))) == [("PER", "Ada")]


def test_a_text_without_tokens_has_no_entities() -> None:
    assert spans(" ", window(("O", 0, 0), ("O", 0, 0))) == []


def test_weak_entities_are_left_out() -> None:
    one = window(("B-PER", 0, 3))
    assert spans("Ada", one, min_score=0.85) == [("PER", "Ada")]
    assert spans("Ada", one, min_score=0.95) == []


def test_the_score_is_the_mean_over_the_tokens() -> None:
    both = window(("B-PER", 0, 3), ("I-PER", 4, 9))
    both.probabilities[1, LABELS.index("I-PER")] = 0.5
    assert extract("Ada Byron", [both], LABELS, 0.0)[0].score == pytest.approx(0.7)


def test_in_an_overlap_each_token_is_read_where_it_lies_farther_from_an_edge() -> None:
    before = window(("O", 0, 1), ("B-PER", 2, 3), ("O", 4, 5))
    after = window(("O", 2, 3), ("B-LOC", 4, 5), ("O", 6, 7))
    assert spans("a b c d", before, after) == [("PER", "b"), ("LOC", "c")]


@given(data=st.data())
def test_entities_over_windows_equal_those_of_the_whole_text(data: st.DataObject) -> None:
    """Labels that depend on the token alone: whichever window it is read from, nothing may be lost, twice or torn."""
    words = data.draw(st.lists(st.sampled_from(["a", "bc", "def", "😀", "张"]), min_size=1, max_size=30))
    gaps = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    labels = data.draw(st.lists(st.sampled_from(LABELS), min_size=len(words), max_size=len(words)))
    text, tokens = "", []
    for word, gap, label in zip(words, gaps, labels, strict=True):
        text += " " * gap
        tokens.append((label, len(text), len(text) + len(word)))
        text += word
    room = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(0, room - 1))
    starts = range(0, max(len(tokens) - stride, 1), room - stride)
    special = ("O", 0, 0)
    windows = [window(special, *tokens[start : start + room], special) for start in starts]

    assert extract(text, windows, LABELS, 0.0) == extract(text, [window(*tokens)], LABELS, 0.0)
