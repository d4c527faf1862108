"""Data goes to standard output, as a table or as JSON; everything else goes to standard error."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 100_000


def tell(message: str) -> None:
    """Write a line of progress."""
    _errors().print(message, highlight=False, markup=False, soft_wrap=True)


def tell_error(message: str) -> None:
    """Write what went wrong."""
    console = _errors()
    console.print("[bold red]Error:[/]", end=" ")
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Write one JSON document on one line."""
    print(json.dumps(value, default=_plain, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows in columns; numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    cells = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], int | float) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in cells:
        table.add_row(*(_cell(value) for value in row))
    # Wider than the terminal where it must be: that breaks lines itself, and what is copied from there is whole, unlike
    # a path that the table would have folded.
    needed = Measurement.get(Console(width=_WIDEST), Console(width=_WIDEST).options, table).maximum
    Console(width=max(Console().width, needed)).print(table, highlight=False)


def shortened(text: str, length: int = 60) -> str:
    """Return a text on one line, its middle cut out when it is long."""
    line = " ".join(text.split())
    half = (length - 1) // 2
    return line if len(line) <= length else f"{line[:half]}…{line[-half:]}"


def _errors() -> Console:
    # Made when used: tests and callers may have replaced the stream since.
    return Console(stderr=True)


def _cell(value: object) -> str:
    # Texts may well contain brackets that are no markup.
    return escape(f"{value:.4f}" if isinstance(value, float) else str(value))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
