"""Texts with labels, from files in every format that `modelfleet batch` reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.batch.rows import RowError, RowReader
from modelfleet_tools.batch.sources import find_sources


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """One label for each text."""

    texts: Sequence[str]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, indices: Sequence[int]) -> "LabelledTexts":
        """Return the chosen ones."""
        return LabelledTexts([self.texts[index] for index in indices], [self.labels[index] for index in indices])


def read_labelled(url: str, *, text_column: str = "text", label_column: str = "label") -> LabelledTexts:
    """Read a path, pattern or URL. Raises InvalidInputError that names the row at fault, or the missing column."""
    texts, labels = [], []
    for found in RowReader(find_sources(url), (text_column, label_column)):
        try:
            values = found.parse()
        except RowError as error:
            raise InvalidInputError(f"{found.place}: {error} Correct the row.") from error
        text, label = values.get(text_column), values.get(label_column)
        if not isinstance(text, str) or not text.strip() or label is None or label == "":
            raise InvalidInputError(
                f"{found.place}: the row needs a text in {text_column!r} and a label in {label_column!r}. Correct it."
            )
        texts.append(text)
        labels.append(str(label))
    if not texts:
        raise InvalidInputError(f"{url} holds no rows.")
    return LabelledTexts(texts, labels)
