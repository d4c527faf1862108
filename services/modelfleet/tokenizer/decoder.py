"""From token ids back to texts."""

from itertools import pairwise

import numpy as np

from modelfleet.runtime.errors import InvalidInputError
from modelfleet.tokenizer.encoder import Int32s
from modelfleet.tokenizer.tokenizers import LoadedTokenizer


def decode(
    tokenizer: LoadedTokenizer,
    ids: Int32s,
    lengths: Int32s,
    *,
    keep_special_tokens: bool,
    skip_unknown_ids: bool = False,
) -> list[str]:
    """
    Return one text for each of `lengths`, which cut `ids` (int32 [tokens]) into sequences.

    Raises InvalidInputError for ids outside the vocabulary, unless they are skipped, and for lengths that do not fit
    the ids.
    """
    if lengths.min(initial=0) < 0:
        raise InvalidInputError(f"lengths has {lengths.min()}; a length is not negative.", field="lengths")
    total = int(lengths.sum(dtype=np.int64))
    if total != len(ids):
        raise InvalidInputError(
            f"The lengths of the {len(lengths)} sequences add up to {total}, but there are {len(ids)} token ids.",
            field="lengths",
        )
    outside = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocabulary_size))
    if outside.size and not skip_unknown_ids:
        position = int(outside[0])
        raise InvalidInputError(
            f"Token id {ids[position]} at position {position} is outside the vocabulary. Use 0 to "
            f"{tokenizer.vocabulary_size - 1}.",
            field="ids",
        )
    listed = ids.tolist()
    ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    sequences = [listed[start:stop] for start, stop in pairwise(ends)]
    if outside.size:
        known = range(tokenizer.vocabulary_size)
        sequences = [[id_ for id_ in sequence if id_ in known] for sequence in sequences]
    return tokenizer.library.decode_batch(sequences, skip_special_tokens=not keep_special_tokens)
