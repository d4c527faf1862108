"""What the cluster answers is what the model says, however requests were batched, split and windowed."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from e2e.conftest import Serving
from modelfleet_tools.bars.texts import sample_texts
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow


class InProcess:
    """MiniLM without any of modelfleet: tokenizers and onnxruntime, one text at a time."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def embed(self, text: str) -> np.ndarray:
        ids = np.array([self._tokenizer.encode(text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, inputs)
        mean = hidden[0].mean(axis=0)
        return mean / np.linalg.norm(mean)


def test_embeddings_equal_in_process_onnxruntime_whatever_batch_they_were_part_of(
    serving: Serving, minilm_folder: Path
) -> None:
    texts = [*sample_texts(150), "a", "naïve café 😀 你好", "word " * 600]
    in_process = InProcess(minilm_folder, max_tokens=256)
    expected = {text: in_process.embed(text) for text in texts}
    shuffled = random.Random(1).sample(texts * 2, 2 * len(texts))
    requests = [shuffled[start : start + 9] for start in range(0, len(shuffled), 9)]

    with ThreadPoolExecutor(24) as callers:
        answers = list(callers.map(lambda request: serving.client.embed("minilm", request).vectors, requests))

    for request, vectors in zip(requests, answers, strict=True):
        for text, vector in zip(request, vectors, strict=True):
            np.testing.assert_allclose(vector, expected[text], atol=1e-5)


def test_a_text_that_was_cut_is_reported_as_cut(serving: Serving) -> None:
    answer = serving.client.embed("minilm", ["short", "word " * 600])

    assert [usage.truncated for usage in answer.usage] == [False, True]
    assert answer.usage[1].token_count == 602


def test_entities_of_a_long_text_found_over_windows_equal_those_found_in_its_parts(serving: Serving) -> None:
    parts = [
        f"Report {number}: please reply to {name} at {name.lower().replace(' ', '.')}@gmail.com before noon. "
        + "Nothing else of interest happened in the office that day, and the weather was fine. " * 4
        for number, name in enumerate(["Ada Lovelace", "Alan Turing", "Grace Hopper", "Edsger Dijkstra"] * 6)
    ]
    text = "".join(parts)
    windowed = serving.client.extract_entities("pii", [text], window_stride=64).results[0]
    by_part = serving.client.extract_entities("pii", parts).results

    found = {(entity.start, entity.end, entity.label) for entity in windowed.entities}
    offset, expected = 0, set()
    for part, result in zip(parts, by_part, strict=True):
        expected |= {(offset + entity.start, offset + entity.end, entity.label) for entity in result.entities}
        offset += len(part)
    assert windowed.usage.window_count > 3
    assert found == expected
    assert len(found) == 3 * len(parts)  # a given name, a surname and an address each
    assert all(text[entity.start : entity.end] == entity.text for entity in windowed.entities)


def test_offsets_count_characters_of_the_text_as_sent(serving: Serving) -> None:
    text = "😀😀 你好, my name is Ada Lovelace 👩‍🔬 and my email is ada.lovelace@example.org."

    (result,) = serving.client.extract_entities("pii", [text]).results

    assert {(entity.label, entity.text) for entity in result.entities} >= {
        ("GIVEN_NAME", "Ada"),
        ("EMAIL", "ada.lovelace@example.org"),
    }
    assert all(text[entity.start : entity.end] == entity.text for entity in result.entities)
