"""The texts of requests: from a file, or made up."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.bars.texts import WordCounts, sample_texts
from modelfleet_tools.batch.rows import RowError, RowReader
from modelfleet_tools.batch.sources import find_sources
from modelfleet_tools.batch.tasks import Columns, Inputs, read_inputs
from modelfleet_tools.texts import read_texts

MOST_TEXTS = 10_000


def texts_of_file(path: Path, column: str) -> list[str]:
    """Return texts of JSONL, CSV or Parquet, or the lines of a .txt; at most 10,000. Raises InvalidInputError."""
    if path.suffix == ".txt":
        return read_texts(None, path)[:MOST_TEXTS]
    reader = RowReader(find_sources(str(path)), (column,))
    try:
        texts = [read_inputs("embed", found.parse(), Columns(column)).texts[0] for found in islice(reader, MOST_TEXTS)]
    except RowError as error:
        raise InvalidInputError(f"{path}: {error}") from error
    if not texts:
        raise InvalidInputError(f"{path} holds no rows.")
    return texts


def made_up_texts(words: WordCounts) -> list[str]:
    """Return texts of log-normal length, the same in every run."""
    return sample_texts(2000, words)


def requests_of(texts: Sequence[str], task: str, texts_per_request: int) -> list[list[Inputs]]:
    """Return the inputs of requests; for rerank, the first text of each is the query."""
    if task == "rerank":
        size = min(texts_per_request + 1, len(texts))
        groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
        if size < 2:  # noqa: PLR2004  a query and a document
            raise InvalidInputError("rerank needs two texts at least: a query and a document.")
        return [[Inputs(tuple(group[1:]), group[0])] for group in groups]
    size = min(texts_per_request, len(texts))
    return [
        [Inputs((text,)) for text in texts[start : start + size]] for start in range(0, len(texts) - size + 1, size)
    ]
