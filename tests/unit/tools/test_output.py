import json
from datetime import UTC, datetime

import numpy as np
import pytest
from modelfleet.client.answers import Embeddings, TextUsage
from modelfleet_tools.output import print_json, print_table, shortened, tell_error


def test_answers_have_a_json_form(capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.array([[0.5, -1.0]], np.float32)

    print_json(
        {"answer": Embeddings(vectors, (TextUsage(3, False, 1),), "é", 2), "at": datetime(2026, 1, 2, tzinfo=UTC)}
    )

    assert json.loads(capsys.readouterr().out) == {
        "answer": {
            "vectors": [[0.5, -1.0]],
            "usage": [{"token_count": 3, "truncated": False, "window_count": 1}],
            "model": "é",
            "model_version": 2,
        },
        "at": "2026-01-02T00:00:00+00:00",
    }


def test_what_has_no_json_form_is_an_error() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        print_json(object())


def test_texts_with_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ("text", "score"), [("[red]not markup[/]", 0.25)])
    tell_error("unclosed [/b")

    shown = capsys.readouterr()
    assert "[red]not markup[/]" in shown.out
    assert "0.2500" in shown.out
    assert shown.err == "Error: unclosed [/b\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("short", "short"), ("two\nlines", "two lines"), ("x" * 100, "x" * 29 + "…" + "x" * 29)],
)
def test_long_texts_lose_their_middle(text: str, shown: str) -> None:
    assert shortened(text) == shown
