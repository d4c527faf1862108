from pathlib import Path

import pytest
from modelfleet.runtime.errors import InvalidInputError
from modelfleet_tools.labelled_texts import LabelledTexts, read_labelled
from modelfleet_tools.train.training import split


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\ngood,1\n"bad, very",0\n'),
        ("a.jsonl", '{"text": "good", "label": 1}\n{"text": "bad, very", "label": 0}\n'),
    ],
)
def test_texts_and_labels_are_read_from_every_format(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)

    assert read_labelled(str(tmp_path / name)) == LabelledTexts(["good", "bad, very"], ["1", "0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words,label\nx,1\n", "has no column 'text'"),
        ("text,label\nx,1\ny\n", r"a\.csv, line 3: The row has 1 cells"),
        ("text,label\nx,1\n ,0\n", r"a\.csv, line 3: the row needs a text"),
        ("text,label\nx,\n", "and a label in 'label'"),
        ("text,label\n", "holds no rows"),
    ],
)
def test_bad_data_is_refused_with_its_place(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)

    with pytest.raises(InvalidInputError, match=message):
        read_labelled(str(tmp_path / "a.csv"))


def test_a_split_holds_out_the_same_share_of_each_label_every_time() -> None:
    data = LabelledTexts(
        [f"text {index}" for index in range(100)], ["rare" if index < 20 else "common" for index in range(100)]
    )

    left, held = split(data, 0.1)

    assert sorted([*left.texts, *held.texts]) == sorted(data.texts)
    assert held.labels.count("rare") == 2
    assert held.labels.count("common") == 8
    assert split(data, 0.1) == (left, held)
