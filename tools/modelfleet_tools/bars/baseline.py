"""R1: what ONNX Runtime does when nothing is between it and the ids. And one text at a time, for the latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

BATCH = 32


class Baseline:
    """A session with ONNX Runtime's own defaults, in this process."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        self._session = ort.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def sorted_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the texts' token ids, shortest first."""
        return sorted((encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))), key=len)

    def run_sorted(self, ids: Sequence[Sequence[int]]) -> None:
        """Run sequences that are sorted by length in batches of 32."""
        for first in range(0, len(ids), BATCH):
            self._run(ids[first : first + BATCH])

    def embed_one(self, text: str) -> NDArray[np.float32]:
        """Tokenize and run one text, and return its mean-pooled, normalized vector."""
        vectors = self._run([self._tokenizer.encode(text).ids])[0]
        mean: NDArray[np.float32] = vectors.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _run(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        shape = (len(ids), max(len(row) for row in ids))
        inputs: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        for index, row in enumerate(ids):
            inputs["input_ids"][index, : len(row)] = row
            inputs["attention_mask"][index, : len(row)] = 1
        output: NDArray[np.float32] = self._session.run(None, inputs)[0]
        return output
