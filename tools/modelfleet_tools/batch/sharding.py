"""Which rows are this process's, when several share an input: every COUNT-th, beginning with INDEX."""

import os
import re
from dataclasses import dataclass
from typing import Self

from modelfleet.runtime.errors import InvalidInputError

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
_SHARD = re.compile(r"(?:(\d{1,6})/)?(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read `INDEX/COUNT`, or `COUNT` alone within an Indexed Job of Kubernetes, which says the index.

        Raises InvalidInputError.
        """
        match = _SHARD.fullmatch(text)
        index = (match[1] or os.environ.get(INDEX_VARIABLE, "")) if match else ""
        if match and index.isdigit() and int(index) < int(match[2]):
            return cls(int(index), int(match[2]))
        raise InvalidInputError(
            f"{text!r} is no shard. Write INDEX/COUNT with an index from 0 to COUNT - 1; COUNT alone needs "
            f"{INDEX_VARIABLE} in the environment."
        )

    def has(self, row: int) -> bool:
        """Return whether a row is of this shard."""
        return row % self.count == self.index

    def path(self, output: str) -> str:
        """Return the name of this shard's output: `out.jsonl.gz` becomes `out-00002-of-00008.jsonl.gz`."""
        if self.count == 1:
            return output
        directory, slash, name = output.rpartition("/")
        stem, dot, endings = name.partition(".")
        return f"{directory}{slash}{stem}-{self.index:05}-of-{self.count:05}{dot}{endings}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
