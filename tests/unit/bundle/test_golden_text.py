import math
from typing import Any

import numpy as np
import pytest
from modelfleet.bundle.golden import GoldenExample
from modelfleet.bundle.golden_text import GoldenText, lead, read_text
from modelfleet.bundle.manifest import Manifest
from modelfleet.runtime.errors import InvalidBundleError

MANIFEST = Manifest(task="generate", model="m.onnx", tokenizer="tokenizer.json", max_tokens=8, vocabulary_size=10)
TEXT = GoldenText(
    "hello", np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32), np.array([-0.1, -0.7], np.float32)
)


def test_what_was_recorded_is_read_again() -> None:
    text = read_text(TEXT.example(), MANIFEST)

    assert (text.name, text.prompt.tolist(), text.token_ids.tolist()) == ("hello", [1, 2, 3], [4, 5])
    assert text.logprobs == pytest.approx([-0.1, -0.7])


@pytest.mark.parametrize(("probability", "expected"), [(0.5, 0.0), (0.75, math.log(3)), (1.0, math.inf)])
def test_a_tokens_lead_is_over_all_others_together(probability: float, expected: float) -> None:
    assert lead(math.log(probability)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": None}, "'input_ids' is missing"),
        ({"logprobs": None}, "'logprobs' is missing"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "it has 0 input_ids, 2 token_ids and 2 logprobs"),
        ({"logprobs": np.zeros((1, 3), np.float32)}, "2 token_ids and 3 logprobs"),
        ({"token_ids": np.zeros((2, 2), np.int32)}, r"it has int32 \[2, 2\] where \[1, tokens\] belong"),
        ({"token_ids": np.zeros((1, 2), np.float32)}, r"it has float32 \[1, 2\]"),
        ({"input_ids": np.zeros((1, 7), np.int32)}, "it has 9 tokens and the model holds 8"),
        ({"token_ids": np.array([[1, 10]])}, "its token ids are from 1 to 10"),
        ({"logprobs": np.array([[math.nan, -1]], np.float32)}, "no logarithms of probabilities"),
    ],
)
def test_what_is_no_example_of_the_model_is_refused(tensors: dict[str, Any], message: str) -> None:
    example = TEXT.example()
    inputs = {"input_ids": tensors.get("input_ids", example.inputs["input_ids"])}
    outputs = {name: tensors.get(name, array) for name, array in example.outputs.items()}

    with pytest.raises(InvalidBundleError, match=message):
        read_text(
            GoldenExample(
                "hello",
                {name: array for name, array in inputs.items() if array is not None},
                {name: array for name, array in outputs.items() if array is not None},
            ),
            MANIFEST,
        )
