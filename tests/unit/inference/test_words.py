"""Entities are of whole words, with all their marks; how a word is labelled is chosen."""

import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.manifest import Aggregation
from modelfleet.inference.tasks.entities import extract
from modelfleet.inference.tasks.labelled_windows import LabelledWindow

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OF_WORDS = tuple(one for one in Aggregation if one is not Aggregation.SIMPLE)


def window(text: str, *pieces: tuple[str, str, float]) -> LabelledWindow:
    """Make a window of pieces of a text, in order, each with a label and its probability."""
    probabilities = np.full((len(pieces), len(LABELS)), 0.01, np.float32)
    offsets, at = [], 0
    for row, (piece, label, probability) in enumerate(pieces):
        probabilities[row, LABELS.index(label)] = probability
        at = text.index(piece, at)
        offsets.append((at, at + len(piece)))
        at += len(piece)
    return LabelledWindow(probabilities, np.array(offsets, np.int32).reshape(-1, 2))


def found(text: str, tokens: LabelledWindow, aggregation: Aggregation) -> list[tuple[str, str]]:
    return [(entity.label, entity.text) for entity in extract(text, [tokens], LABELS, 0.0, aggregation)]


BRENNAN = ("Brenn", "B-PER", 0.6), ("an", "B-LOC", 0.9), ("said", "O", 0.9)
WASHINGTON = ("Wash", "B-LOC", 0.7), ("ing", "O", 0.8), ("ton", "O", 0.8)


@pytest.mark.parametrize(
    ("pieces", "aggregation", "expected"),
    [
        (BRENNAN, Aggregation.SIMPLE, [("PER", "Brenn"), ("LOC", "an")]),
        (BRENNAN, Aggregation.FIRST, [("PER", "Brennan")]),
        (BRENNAN, Aggregation.MAX, [("LOC", "Brennan")]),
        (BRENNAN, Aggregation.AVERAGE, [("LOC", "Brennan")]),
        (WASHINGTON, Aggregation.FIRST, [("LOC", "Washington")]),
        (WASHINGTON, Aggregation.MAX, []),
        (WASHINGTON, Aggregation.AVERAGE, []),
    ],
)
def test_a_word_has_one_label(
    pieces: tuple[tuple[str, str, float], ...], aggregation: Aggregation, expected: list[tuple[str, str]]
) -> None:
    text = "Brennan said" if pieces is BRENNAN else "Washington"
    assert found(text, window(text, *pieces), aggregation) == expected


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        pytest.param("Rome, now", ("Rome", ","), ["Rome"], id="a comma is no part of a word"),
        pytest.param("(Rome)", ("(", "Rome", ")"), ["Rome"], id="nor are brackets"),
        pytest.param("张三来", ("张", "三", "来"), ["张三"], id="characters of Chinese are words"),
    ],
)
def test_what_is_not_of_words_keeps_its_own_label(text: str, pieces: tuple[str, ...], expected: list[str]) -> None:
    inside = {"Rome": "B-LOC", "张": "B-LOC", "三": "I-LOC"}
    tokens = window(text, *((piece, inside.get(piece, "O"), 0.9) for piece in pieces))
    assert [entity for _, entity in found(text, tokens, Aggregation.FIRST)] == expected


@pytest.mark.parametrize(
    ("text", "tokens", "whole"),
    [
        pytest.param(unicodedata.normalize("NFD", "José sat"), [(0, 4)], 5, id="an accent of its own"),
        pytest.param(unicodedata.normalize("NFD", "Joséph"), [(0, 4), (5, 7)], 7, id="and inside of a word"),
        pytest.param("Zoe\u0308\u0323 sat", [(0, 3)], 5, id="two accents"),
        pytest.param("❤\ufe0f sat", [(0, 1)], 2, id="a variation selector"),
        pytest.param("👩\u200d🚀 sat", [(0, 1)], 3, id="joined emoji"),
        pytest.param("प्रिया sat", [(0, 1)], 2, id="a vowel sign"),
        pytest.param("cat\u200d", [(0, 3)], 4, id="a joiner at the end"),
    ],
)
def test_a_mask_leaves_no_mark_behind(text: str, tokens: list[tuple[int, int]], whole: int) -> None:
    probabilities = np.zeros((len(tokens), len(LABELS)), np.float32)
    probabilities[:, 1] = 0.9
    windows = [LabelledWindow(probabilities, np.array(tokens, np.int32))]
    for aggregation in Aggregation:
        (entity,) = extract(text, windows, LABELS, 0.0, aggregation)
        assert (entity.start, entity.end) == (0, whole)


words_of_text = st.lists(st.text("abcdé", min_size=1, max_size=6), min_size=1, max_size=6)


@given(words_of_text, st.data(), st.sampled_from(OF_WORDS))
def test_no_entity_begins_or_ends_inside_a_word(written: list[str], data: st.DataObject, way: Aggregation) -> None:
    text, pieces = " ".join(written), []
    for word in written:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(word)), max_size=3)) | {0, len(word)})
        for start, end in pairwise(cuts):
            label, probability = data.draw(st.tuples(st.sampled_from(LABELS), st.floats(0.3, 1)))
            pieces.append((word[start:end], label, probability))

    entities = extract(text, [window(text, *pieces)], LABELS, 0.0, way)

    starts = {0} | {at + 1 for at, character in enumerate(text) if character == " "}
    ends = {len(text)} | {at for at, character in enumerate(text) if character == " "}
    previous = 0
    for entity in entities:
        assert entity.start in starts
        assert entity.end in ends
        assert entity.text == text[entity.start : entity.end]
        assert entity.start >= previous
        previous = entity.end
