"""
Golden examples of models that generate: prompts, and the tokens that were likeliest after them.

They are kept as any golden examples: `input_ids` [1, tokens] go in, `token_ids` [1, tokens] and their natural
`logprobs` come out. These tell where the model was certain. Where it was not, another device that computes as well may
choose another token, and where it was it may not: so tokens can be compared one by one, whatever computed them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.golden import GoldenExample
from modelfleet.bundle.manifest import Manifest
from modelfleet.runtime.errors import InvalidBundleError

# For scale: threads and batches overturn none of SmolLM2's choices, and fp32 weights in place of int4 those that led by
# up to 1.1. A device differs by less than that; another model by far more.
DEFAULT_LEAD = 1.0
"""A token with a probability of 0.73 leads any other by so much."""


@dataclass(frozen=True, slots=True, eq=False)
class GoldenText:
    """A prompt and what followed it: int32 [tokens] each, with a float32 log-probability for each that followed."""

    name: str
    prompt: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def example(self) -> GoldenExample:
        """Return it as a bundle keeps it."""
        outputs = {"token_ids": self.token_ids[None], "logprobs": self.logprobs[None]}
        return GoldenExample(self.name, {"input_ids": self.prompt[None]}, outputs)


def lead(logprob: float) -> float:
    """Return by how much, in log-odds, a token was at least likelier than any other."""
    rest = -math.expm1(logprob)
    return logprob - math.log(rest) if rest > 0 else math.inf


def read_text(example: GoldenExample, manifest: Manifest) -> GoldenText:
    """Return what an example holds. Raises InvalidBundleError where it is none of this model."""
    try:
        text = GoldenText(
            example.name,
            _row(example.inputs["input_ids"], "iu").astype(np.int32),
            _row(example.outputs["token_ids"], "iu").astype(np.int32),
            _row(example.outputs["logprobs"], "f").astype(np.float32),
        )
    except (KeyError, ValueError) as error:
        raise _unusable(example, f"{error} is missing" if isinstance(error, KeyError) else str(error)) from error
    length = len(text.prompt) + len(text.token_ids)
    if not len(text.prompt) or not len(text.token_ids) or len(text.token_ids) != len(text.logprobs):
        shown = f"{len(text.prompt)} input_ids, {len(text.token_ids)} token_ids and {len(text.logprobs)} logprobs"
        raise _unusable(example, f"it has {shown}")
    if manifest.max_tokens and length > manifest.max_tokens:
        raise _unusable(example, f"it has {length} tokens and the model holds {manifest.max_tokens}")
    ids = np.concatenate([text.prompt, text.token_ids])
    if ids.min() < 0 or (manifest.vocabulary_size and ids.max() >= manifest.vocabulary_size):
        raise _unusable(example, f"its token ids are from {ids.min()} to {ids.max()}")
    if not (text.logprobs <= 0).all():  # NaN, too
        raise _unusable(example, "its logprobs are no logarithms of probabilities")
    return text


def _row(array: NDArray[Any], kinds: str) -> NDArray[Any]:
    if array.dtype.kind not in kinds or array.shape[:1] != (1,) or array.ndim != 2:  # noqa: PLR2004  [1, tokens]
        raise ValueError(f"it has {array.dtype} {list(array.shape)} where [1, tokens] belong")
    row: NDArray[Any] = array[0]
    return row


def _unusable(example: GoldenExample, why: str) -> InvalidBundleError:
    return InvalidBundleError(
        f"The golden example {example.name!r} is none of a model that generates: {why}. Record it again.",
        field=GOLDEN_FILE,
    )
