"""A real model answers through the three services as three processes."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e.conftest import SAMPLES, Serving, push
from modelfleet_tools.bars.generation import Bare
from modelfleet_tools.samples import find_sample, is_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.export,
    pytest.mark.skipif(
        not is_whole(find_sample("smollm2"), SAMPLES / "smollm2"),
        reason="smollm2 has not been built: `make test-export` builds it and runs these tests",
    ),
]
TOPICS = ("cats", "the sea", "Ada Lovelace", "bread", "prime numbers", "Paris", "three colours", "why the sky is blue")
QUESTION = ({"role": "user", "content": "What is the capital of France?"},)


@pytest.fixture(scope="module")
def smollm2(serving: Serving) -> Iterator[Serving]:
    push(serving.client, SAMPLES / "smollm2", "smollm2")
    yield serving
    serving.client.delete_alias("smollm2", "stable")
    serving.client.delete_model_version("smollm2", 1)


def test_the_capital_of_france_is_paris(smollm2: Serving) -> None:
    chunks = list(smollm2.client.generate("smollm2", messages=QUESTION, max_tokens=24, temperature=0, timeout_s=60))

    assert "The capital of France is Paris" in "".join(chunk.text for chunk in chunks)
    assert len(chunks) > 3  # streamed
    assert chunks[-1].usage
    assert chunks[-1].usage.generated_tokens == sum(len(chunk.token_ids) for chunk in chunks) == 7  # it ends there


def test_eight_streams_say_what_the_engine_alone_says(smollm2: Serving) -> None:
    questions = [f"<|im_start|>user\nTell me about {what}.<|im_end|>\n<|im_start|>assistant\n" for what in TOPICS]
    tokens = smollm2.client.tokenize("smollm2", questions, special_tokens=False)
    prompts = [ids.tolist() for ids in tokens.ids]

    def said(prompt: list[int]) -> list[int]:
        chunks = smollm2.client.generate("smollm2", token_ids=prompt, max_tokens=24, temperature=0, timeout_s=100)
        return [id_ for chunk in chunks for id_ in chunk.token_ids]

    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(threads.map(said, prompts))

    assert together == Bare(SAMPLES / "smollm2").generate(prompts, 24)
    assert said(prompts[0]) == together[0]


def test_whatever_is_drawn_keeps_to_a_schema(smollm2: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 30, 99]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    chunks = smollm2.client.generate(
        *("smollm2", "Ada: "), json_schema=json.dumps(schema), temperature=1.5, n=4, max_tokens=200, timeout_s=100
    )
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk.index] += chunk.text

    answers = [json.loads(text) for text in texts]
    assert all(isinstance(answer["name"], str) and answer["age"] in (1, 30, 99) for answer in answers)


def test_characters_of_many_tokens_arrive_whole(smollm2: Serving) -> None:
    prompt = "你好, world! Ça va? 😀"  # it goes on with the like
    chunks = list(smollm2.client.generate("smollm2", prompt, max_tokens=40, temperature=0, timeout_s=60))

    assert "👏" in "".join(chunk.text for chunk in chunks)
    assert all("\ufffd" not in chunk.text for chunk in chunks)
