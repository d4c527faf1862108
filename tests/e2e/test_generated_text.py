"""A real model answers through the three services as three processes."""

from collections.abc import Iterator

import pytest
from e2e.conftest import SAMPLES, Serving, push
from modelfleet_tools.samples import find_sample, is_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_whole(find_sample("smollm2"), SAMPLES / "smollm2"),
        reason="smollm2 has not been built: `modelfleet samples fetch smollm2`, which needs the extra [export]",
    ),
]
QUESTION = ({"role": "user", "content": "What is the capital of France?"},)


@pytest.fixture
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
    assert chunks[-1].usage.generated_tokens == 24
