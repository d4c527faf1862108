"""The texts of one request as token ids, between tokenization and the session."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """
    Windows of texts, in the order of the texts; the windows of one text follow one another.

    ids: int32 [all tokens]. lengths: int32 [windows]. type_ids: uint8 [all tokens], None when all are 0. offsets: int32
    [all tokens, 2], characters of the original text, None unless asked for. window_counts: int32 [texts].
    token_counts: int32 [texts], before any cut.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    type_ids: NDArray[np.uint8] | None
    offsets: NDArray[np.int32] | None
    window_counts: NDArray[np.int32]
    token_counts: NDArray[np.int32]
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        object.__setattr__(self, "starts", starts)

    @classmethod
    def whole(
        cls, ids: NDArray[np.int32], lengths: NDArray[np.int32], type_ids: NDArray[np.uint8] | None = None
    ) -> Self:
        """Return texts of which nothing was cut, each one window of its own."""
        return cls(ids, lengths, type_ids, None, np.ones_like(lengths), lengths)

    def usage(self) -> list["TextUsage"]:
        """Return what was done with each text."""
        if len(self.window_counts) == len(self.lengths):
            pairs = zip(self.token_counts.tolist(), self.lengths.tolist(), strict=True)
            return [TextUsage(tokens, tokens > kept, 1) for tokens, kept in pairs]
        pairs = zip(self.token_counts.tolist(), self.window_counts.tolist(), strict=True)
        return [TextUsage(tokens, truncated=False, window_count=windows) for tokens, windows in pairs]


@dataclass(frozen=True, slots=True)
class TextUsage:
    """What was done with one text: its tokens before any cut, whether it was cut, how many windows covered it."""

    token_count: int
    truncated: bool
    window_count: int
