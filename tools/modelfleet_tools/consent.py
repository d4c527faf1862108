"""What takes something out of service is asked for on a terminal, and wants `--force` elsewhere."""

import sys
from typing import Annotated, TypeAlias

import typer
from modelfleet.runtime.errors import StateConflictError

ForceOption: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Do it though it takes something out of service; nothing is asked.")
]


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def require_consent(consequence: str, *, force: bool, instead: str = "") -> None:
    """
    Return if the consequence, a sentence, is wanted.

    Raises StateConflictError where it is not, or where there is nobody to ask; `instead` is a sentence of advice.
    """
    if force or (is_terminal() and typer.confirm(f"{consequence} Go on?", err=True)):
        return
    raise StateConflictError(" ".join(filter(None, (consequence, "Nothing was changed.", instead, "--force does it."))))
