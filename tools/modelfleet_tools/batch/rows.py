"""Rows of JSONL, CSV and Parquet, one after another, each with the place that messages name."""

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TypeAlias

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from modelfleet.runtime.errors import InvalidInputError, UnavailableError

from modelfleet_tools.batch.sources import DAMAGE, Format, Source

Values: TypeAlias = Mapping[str, object]

# A longer row is no row of text; it fails without being held in memory.
MAX_ROW_BYTES = 32 << 20
_ROWS_AT_ONCE = 256
_PARQUET_BUFFER_BYTES = 1 << 20


class RowError(Exception):
    """A row cannot be used; the message is for people."""


@dataclass(frozen=True, slots=True)
class Found:
    """
    A row before it is parsed, so that skipping it costs little.

    `number` counts from 0 over all files; `place` is such as `a.jsonl, line 7`. `parse` raises RowError.
    """

    number: int
    place: str
    parse: Callable[[], Values]


class RowReader:
    """
    Reads the rows of all sources in order.

    A file that turns out to be damaged gives a last row, which cannot be parsed and says so, and the next file is read.
    `columns` are those that are needed: a table without one of them counts as damaged, unless it is the first file,
    which raises InvalidInputError.
    """

    def __init__(self, sources: Sequence[Source], columns: Sequence[str]) -> None:
        self._sources = sources
        self._columns = tuple(dict.fromkeys(columns))
        self._size = sum(source.size for source in sources)
        self._behind = 0
        self._within = 0.0  # bytes read of the file under way
        self.found = 0
        """Rows met so far, of all shards."""

    @property
    def fraction(self) -> float:
        """How much of the input's bytes has been read, 0 to 1."""
        return (self._behind + self._within) / self._size if self._size else 1.0

    def kept_types(self, columns: Sequence[str]) -> dict[str, pa.DataType]:
        """Return the Arrow types that columns have in the first file; where it has none, they are texts."""
        first = self._sources[0]
        if first.format is not Format.PARQUET or not columns:
            return dict.fromkeys(columns, pa.string())
        try:
            with first.location.system.open_input_file(first.location.path) as file:
                schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInputError(f"{first.name} is no whole Parquet file: {error}.") from error
        self._check_columns(first, schema.names)
        return {column: schema.field(column).type for column in columns}

    def __iter__(self) -> Iterator[Found]:
        for found in self._all():
            self.found = found.number + 1
            yield found

    def _all(self) -> Iterator[Found]:
        number = 0
        for index, source in enumerate(self._sources):
            try:
                for place, parse in self._rows(source):
                    yield Found(number, f"{source.name}, {place}", parse)
                    number += 1
            except InvalidInputError as error:
                if not index:
                    raise
                yield Found(number, source.name, _failing(error.message))
                number += 1
            except DAMAGE as error:
                yield Found(
                    number, source.name, _failing(f"The file is damaged, its rows from here on are lost: {error}.")
                )
                number += 1
            except OSError as error:
                raise UnavailableError(f"{source.name} cannot be read: {error}. Go on with --resume.") from error
            self._behind += source.size
            self._within = 0.0

    def _rows(self, source: Source) -> Iterator[tuple[str, Callable[[], Values]]]:
        if source.format is Format.PARQUET:
            yield from self._parquet_rows(source)
            return
        stream, raw = source.open()
        with raw, stream:
            rows = _json_rows(stream) if source.format is Format.JSONL else self._csv_rows(source, stream)
            for number, row in enumerate(rows):
                if number % _ROWS_AT_ONCE == 0:
                    self._within = raw.tell()
                yield row

    def _csv_rows(self, source: Source, stream: IO[bytes]) -> Iterator[tuple[str, Callable[[], Values]]]:
        csv.field_size_limit(MAX_ROW_BYTES)
        # Bytes that are no UTF-8 fail the row that has them, not the file.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, None)
        if header is None:
            return
        self._check_columns(source, header)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {reader.line_num}", _failing(f"The row is no CSV: {error}.")
            else:
                if cells:
                    yield f"line {reader.line_num}", _parse_cells(header, cells)

    def _parquet_rows(self, source: Source) -> Iterator[tuple[str, Callable[[], Values]]]:
        with source.location.system.open_input_file(source.location.path) as file:
            try:
                table = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)
                self._check_columns(source, table.schema_arrow.names)
                row = 0
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(self._columns)):
                    for index in range(batch.num_rows):
                        yield f"row {row}", _parse_batch(batch, index)
                        row += 1
                    self._within = source.size * row / table.metadata.num_rows
            except pa.ArrowInvalid as error:
                raise EOFError(str(error)) from error

    def _check_columns(self, source: Source, names: Sequence[str]) -> None:
        if missing := [column for column in self._columns if column not in names]:
            raise InvalidInputError(
                f"{source.name} has no column {missing[0]!r}. It has {', '.join(map(repr, names))}. "
                "Say which to take, such as with --text-column."
            )


def _json_rows(stream: IO[bytes]) -> Iterator[tuple[str, Callable[[], Values]]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            yield f"line {number}", _failing(f"The line is longer than {MAX_ROW_BYTES} bytes.")
            continue
        # What Windows puts before the first row is no part of it.
        row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if row.strip():
            yield f"line {number}", _parse_line(row)


def _parse_line(line: bytes) -> Callable[[], Values]:
    def parse() -> Values:
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise RowError(f"The line is no JSON: {error}.") from error
        if not isinstance(values, dict):
            raise RowError('The line is JSON but no object. A row is such as {"text": "…"}.')
        return values

    return parse


def _parse_cells(header: Sequence[str], cells: Sequence[str]) -> Callable[[], Values]:
    def parse() -> Values:
        if len(cells) != len(header):
            raise RowError(f"The row has {len(cells)} cells, the header {len(header)}.")
        try:
            "".join(cells).encode()
        except UnicodeEncodeError as error:
            raise RowError("The row is not UTF-8. Convert the file.") from error
        return dict(zip(header, cells, strict=True))

    return parse


def _parse_batch(batch: pa.RecordBatch, index: int) -> Callable[[], Values]:
    return lambda: {name: batch.column(name)[index].as_py() for name in batch.schema.names}


def _failing(message: str) -> Callable[[], Values]:
    def parse() -> Values:
        raise RowError(message)

    return parse
