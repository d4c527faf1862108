"""A built decoder beside the checkpoint that it was built from: what they think comes next, and how fast they write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from modelfleet.bundle.golden import difference
from modelfleet.bundle.manifest import Manifest
from modelfleet.runtime.errors import InvalidBundleError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from modelfleet_tools.export.drift import softmax
from modelfleet_tools.export.parity import Parity
from modelfleet_tools.export.quiet import first_line, quiet
from modelfleet_tools.export.text_rows import DEFAULT_TEXTS

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

_SEED = 20260101
_LENGTHS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_WRITTEN = 16
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Prompts:
    """Real texts and random ids of many lengths, each int64 [tokens]."""

    texts: Sequence[Ids]
    random: Sequence[Ids]


@dataclass(frozen=True, slots=True)
class Reading:
    """Logits [tokens, vocabulary] after each token of each prompt; of random prompts after the last one only."""

    texts: Sequence[Floats]
    random: Sequence[Floats]
    tokens_per_s: float


def prompts(folder: Path, manifest: Manifest) -> Prompts:
    """Return prompts for the tokenizer of a built folder."""
    tokenizer = Tokenizer.from_file(str(folder / (manifest.tokenizer or "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    generator = np.random.default_rng(_SEED)
    longest = max((manifest.max_tokens or 2 * _LENGTHS[-1]) - _WRITTEN, 1)
    vocabulary = manifest.vocabulary_size or tokenizer.get_vocab_size()
    return Prompts(
        [np.array(encoding.ids[:longest], np.int64) for encoding in tokenizer.encode_batch(DEFAULT_TEXTS)],
        [generator.integers(0, vocabulary, length) for length in _LENGTHS if length <= longest],
    )


def read_checkpoint(checkpoint: Path, given: Prompts) -> Reading:
    """Read the prompts with torch in fp32. Raises InvalidBundleError."""
    with quiet():
        import torch  # noqa: PLC0415  torch is needed by exports alone
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with quiet(), torch.inference_mode():
        try:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
        except Exception as error:  # transformers raises nearly anything for weights that are not there
            raise InvalidBundleError(
                f"transformers cannot load {checkpoint}: {first_line(error)}", field="path"
            ) from error

        def logits(ids: Ids) -> Floats:
            found: Floats = model(torch.from_numpy(ids[None])).logits[0].numpy()
            return found

        def write(ids: Ids) -> None:
            model.generate(
                torch.from_numpy(ids[None]), max_new_tokens=_WRITTEN, min_new_tokens=_WRITTEN, do_sample=False
            )

        return Reading(
            [logits(ids) for ids in given.texts],
            [logits(ids)[-1:] for ids in given.random],
            _tokens_per_s(write, given.texts[0]),
        )


def runs_here(device: str) -> bool:
    """Return whether what is built for a device can be run on this machine."""
    import onnxruntime_genai as og  # noqa: PLC0415  takes a second to import

    return device == "cpu" or bool(og.is_cuda_available())


def read_built(folder: Path, given: Prompts) -> Reading:
    """Read them with onnxruntime-genai. Raises InvalidBundleError."""
    import onnxruntime_genai as og  # noqa: PLC0415  takes a second to import

    try:
        model = og.Model(str(folder))
    except Exception as error:
        raise InvalidBundleError(
            f"onnxruntime-genai refuses what was built: {first_line(error)}", field="model"
        ) from error

    def begun(ids: Ids, tokens: int) -> og.Generator:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, min_length=len(ids) + tokens, max_length=len(ids) + tokens)
        generator = og.Generator(model, params)
        generator.append_tokens(ids.astype(np.int32))
        return generator

    def logits(ids: Ids) -> Floats:
        return np.asarray(begun(ids, 1).get_output("logits")[0], np.float32)

    def write(ids: Ids) -> None:
        generator = begun(ids, _WRITTEN)
        while not generator.is_done():
            generator.generate_next_token()

    return Reading(
        [logits(ids) for ids in given.texts],
        [logits(ids)[-1:] for ids in given.random],
        _tokens_per_s(write, given.texts[0]),
    )


def compare(given: Prompts, source: Reading, built: Reading) -> tuple[Parity, float]:
    """
    Return how far logits are apart, and the drift.

    The drift is the mean, over the tokens of real texts, of the total variation distance between both distributions of
    the next one: how often a token that is drawn comes out as another.
    https://en.wikipedia.org/wiki/Total_variation_distance_of_probability_measures
    """
    real = max(difference(before, after) for before, after in zip(source.texts, built.texts, strict=True))
    worst, length = real, max(map(len, given.texts))
    for ids, before, after in zip(given.random, source.random, built.random, strict=True):
        if (found := difference(before, after)) > worst:
            worst, length = found, len(ids)
    moved = [
        0.5 * np.abs(softmax(after) - softmax(before)).sum(axis=-1)
        for before, after in zip(source.texts, built.texts, strict=True)
    ]
    return Parity(len(given.random), worst, {"sequence": length}, real), float(np.concatenate(moved).mean())


def _tokens_per_s(write: Callable[[Ids], None], prompt: Ids) -> float:
    """Return the best of a few turns."""
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        write(prompt)
        best = max(best, _WRITTEN / (time.perf_counter() - started))
    return best
