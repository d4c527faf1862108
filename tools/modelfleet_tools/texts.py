"""Where a command's texts come from: its arguments, a file, or standard input."""

import sys
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

InputOption: TypeAlias = Annotated[
    Path | None, typer.Option("--input", help="A file with one text a line; - for standard input.")
]


def read_texts(arguments: list[str] | None, source: Path | None, what: str = "TEXTS") -> list[str]:
    """
    Return the texts of the arguments, or the lines of `source`, or, when neither is given, of standard input.

    Raises typer.BadParameter when there are none, or two sources.
    """
    if arguments and source:
        raise typer.BadParameter(f"Give {what} or --input, not both.")
    if arguments:
        return arguments
    if source and str(source) != "-":
        try:
            return _lines(source.read_bytes(), str(source))
        except OSError as error:
            raise typer.BadParameter(f"{source} cannot be read: {error.strerror}.") from error
    if sys.stdin.isatty() and not source:
        raise typer.BadParameter(f"Give {what} as arguments, --input FILE, or lines on standard input.")
    return _lines(sys.stdin.buffer.read(), "standard input")


def _lines(data: bytes, source: str) -> list[str]:
    try:
        # Not str.splitlines, which also breaks at characters that occur within texts.
        lines = data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{source} is not UTF-8 at byte {error.start}. Convert it.") from error
    lines = [line.removesuffix("\r") for line in lines]
    if lines == [""]:
        raise typer.BadParameter(f"{source} holds no text.")
    return lines
