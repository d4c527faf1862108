import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.runtime.errors import InvalidBundleError

EMBED = {"task": "embed", "model": "model.onnx", "tokenizer": "tokenizer.json", "max_tokens": 512}


def test_defaults_are_those_of_most_models() -> None:
    manifest = Manifest.from_json(json.dumps(EMBED))

    assert (manifest.task, manifest.pooling, manifest.normalize, manifest.pad_token_id) == (
        Task.EMBED,
        "mean",
        False,
        0,
    )


def test_a_tensor_model_needs_nothing_but_its_graph() -> None:
    assert Manifest.from_json('{"task": "tensor", "model": "model.onnx"}').tokenizer is None


@given(st.permutations(list(EMBED.items())))
def test_the_canonical_json_is_the_same_whatever_the_order_of_fields(items: list[tuple[str, object]]) -> None:
    canonical = Manifest.from_json(json.dumps(dict(items), indent=2)).to_json()

    assert canonical == Manifest.from_json(json.dumps(EMBED)).to_json()
    assert Manifest.from_json(canonical).to_json() == canonical


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"task": "translate"}, ["task", "'embed'"]),
        ({"task": None}, ["task"]),
        ({"tokenizer": None}, ["the task 'embed' needs a tokenizer: add tokenizer.json"]),
        ({"max_tokens": None}, ["needs max_tokens"]),
        ({"max_tokens": 0}, ["max_tokens", "greater than or equal to 1"]),
        ({"max_tokens": "many"}, ["max_tokens", "integer"]),
        ({"pooling": "median"}, ["pooling", "'mean'"]),
        ({"maxtokens": 1}, ["maxtokens", "not permitted"]),
        ({"task": "classify"}, ["the task 'classify' needs labels"]),
        ({"task": "entities"}, ["the task 'entities' needs labels"]),
        ({"pad_token_id": -1, "normalize": "perhaps"}, ["pad_token_id", "normalize"]),
    ],
)
def test_each_field_at_fault_is_named(changes: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(InvalidBundleError) as raised:
        Manifest.from_json(json.dumps({**EMBED, **changes}), source="modelfleet.yaml")
    assert raised.value.field == "modelfleet.yaml"
    assert raised.value.message.startswith("modelfleet.yaml: ")
    for message in messages:
        assert message in raised.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"embed"', b"\xff"])
def test_what_is_no_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidBundleError, match="manifest_json: manifest: "):
        Manifest.from_json(text)


def test_yaml_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(InvalidBundleError, match=r"modelfleet.yaml: manifest: "):
        Manifest.from_mapping(["task", "embed"], source="modelfleet.yaml")
