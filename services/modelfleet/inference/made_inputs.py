"""Inputs that a self-test makes up: token ids and tensors, random, and the same at each load of a version."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.inference.tokens import Tokens

# Where nobody knows the vocabulary, its first ids are taken.
_FEW_IDS = 16
# Of integers that look nothing up: small enough for what counts something, and more than one.
_FEW_INTEGERS = 4
# Of axes that may vary, in this order until the graph takes one: images and sound want many, others few.
_SIZES = (8, 3, 32, 1, 224)
_BYTES = 256
_WORDS = ("", "a", "the cat sat on the mat", "42", "-1.5", "Zürich", "yes", "no")


_Floats = Callable[[np.random.Generator, tuple[int, ...]], Array]


def random_tokens(
    lengths: Sequence[int], vocabulary_size: int | None, pad_token_id: int, random: np.random.Generator
) -> Tokens:
    """Return rows of these lengths, each a text of its own, of any ids but padding."""
    total = sum(lengths)
    ids = random.integers(0, vocabulary_size or _FEW_IDS, total, dtype=np.int32)
    if (vocabulary_size or _FEW_IDS) > 1:
        ids[ids == pad_token_id] = 1 if pad_token_id == 0 else 0
    return Tokens.whole(ids, np.array(lengths, np.int32))


def random_rows(
    specs: Sequence[TensorSpec],
    table_rows: Mapping[str, int],
    samples: Sequence[Mapping[str, Array]],
    rows: int,
    random: np.random.Generator,
) -> Iterator[dict[str, Array]]:
    """
    Yield inputs [rows, ...] of different kinds, for a graph that may refuse some of them.

    Those of `samples`, changed at random, come first; then all of random numbers: around 0, from 0 to 1, most of them
    0, and large. `table_rows` says from how many rows an integer input chooses, where it does.
    """
    for sample in samples:
        yield {name: _changed(array, rows, random) for name, array in sample.items()}
    for size in _SIZES if any(None in spec.shape[1:] for spec in specs) else (1,):
        for floats in _FLOATS:
            yield {
                spec.name: _made_up(
                    spec.dtype,
                    (rows, *(size if length is None else length for length in spec.shape[1:])),
                    table_rows.get(spec.name),
                    floats,
                    random,
                )
                for spec in specs
            }


def _changed(array: Array, rows: int, random: np.random.Generator) -> Array:
    """Return rows of a sample, repeated to as many; but for the first, their elements change places with others'."""
    repeated = np.concatenate([array] * (rows // len(array) + 1))[:rows]
    if repeated.ndim == 1:
        return repeated
    flat = repeated.reshape(rows, -1)
    for index in range(1, rows):
        flat[index] = flat[index][random.permutation(flat.shape[1])]
    return flat.reshape(repeated.shape)


def _made_up(
    dtype: np.dtype[Any], shape: tuple[int, ...], choices: int | None, floats: _Floats, random: np.random.Generator
) -> Array:
    if dtype == np.object_:
        return random.choice(np.array(_WORDS, np.object_), shape)
    if dtype.kind == "b":
        return random.random(shape) < 0.5  # noqa: PLR2004  either is as likely
    if dtype.kind in "iu":
        image = dtype == np.uint8 and choices is None
        return random.integers(0, _BYTES if image else choices or _FEW_INTEGERS, shape).astype(dtype)
    return floats(random, shape).astype(dtype)


def _around_zero(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.normal(size=shape)


def _up_to_one(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.random(shape)


def _mostly_zero(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Of each row another share is 1: of the first none."""
    shares = np.linspace(0, 0.2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (random.random(shape) < shares).astype(np.float64)


def _large(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 100 * random.random(shape)


_FLOATS = (_around_zero, _mostly_zero, _up_to_one, _large)
