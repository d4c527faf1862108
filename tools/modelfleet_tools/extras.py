"""Libraries that only some commands need."""

from collections.abc import Iterator
from contextlib import contextmanager

from modelfleet.runtime.errors import InvalidInputError


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Say which extra of the package to install when an import within the block finds nothing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modelfleet"):
            raise
        raise InvalidInputError(
            f"This needs {error.name}, which is not installed. In a checkout of modelfleet: "
            f"pip install --constraint constraints.txt --editable '.[{extra}]'."
        ) from error
