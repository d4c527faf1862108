"""
How results are written.

Rows are encoded in chunks that can be appended to a file one after another, and be cut off again: lines, members of
gzip, frames of Zstandard, and for Parquet, whose files cannot grow, Arrow streams that become one file at the end.
"""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from modelfleet_tools.batch import zstd
from modelfleet_tools.batch.sources import Compression, Format

_ROW_GROUP_BYTES = 32 << 20
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


class Encoder(Protocol):
    """Turns chunks of rows into bytes, the same for the same rows."""

    def chunk(self, records: Sequence[Mapping[str, object]], *, first: bool) -> bytes:
        """Return what is appended for a chunk."""

    def finish(self, staged: Path) -> Path:
        """Return the file that holds the output, made from the appended chunks."""


def encoder(format_: Format, compression: Compression, schema: pa.Schema) -> Encoder:
    """Return the encoder of a format."""
    match format_:
        case Format.JSONL:
            return JsonLines(compression)
        case Format.CSV:
            return Csv(compression, schema.names)
        case Format.PARQUET:
            return Parquet(schema)


class JsonLines:
    """One object a line; vectors are written with the digits of float32."""

    def __init__(self, compression: Compression = Compression.NONE) -> None:
        self._compression = compression

    def chunk(self, records: Sequence[Mapping[str, object]], *, first: bool) -> bytes:  # noqa: ARG002  as the protocol
        """Return the lines."""
        return _compressed(b"".join(orjson.dumps(record, option=_JSON) for record in records), self._compression)

    def finish(self, staged: Path) -> Path:
        """Return the file as it is."""
        return staged


class Csv:
    """A header and rows; lists are written as JSON."""

    def __init__(self, compression: Compression, names: Sequence[str]) -> None:
        self._compression = compression
        self._names = names

    def chunk(self, records: Sequence[Mapping[str, object]], *, first: bool) -> bytes:
        """Return the rows, below the header in the first chunk."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if first:
            writer.writerow(self._names)
        writer.writerows([_cell(record.get(name)) for name in self._names] for record in records)
        return _compressed(text.getvalue().encode(), self._compression)

    def finish(self, staged: Path) -> Path:
        """Return the file as it is."""
        return staged


class Parquet:
    """Columns with types; vectors are lists of float32."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema

    def chunk(self, records: Sequence[Mapping[str, object]], *, first: bool) -> bytes:  # noqa: ARG002  as the protocol
        """Return an Arrow stream."""
        columns = [
            pa.array([_typed(record.get(field.name), field.type) for record in records], field.type)
            for field in self._schema
        ]
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, self._schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        return cast("bytes", stream.getvalue().to_pybytes())

    def finish(self, staged: Path) -> Path:
        """Return the Parquet file, beside the staged one, made of its Arrow streams."""
        finished = staged.with_name(f"{staged.name}.parquet")
        size = staged.stat().st_size
        with staged.open("rb") as source, pq.ParquetWriter(finished, self._schema, compression="zstd") as writer:
            gathered: list[pa.RecordBatch] = []
            while source.tell() < size:
                gathered += pa.ipc.open_stream(source)
                if sum(batch.nbytes for batch in gathered) >= _ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(gathered, self._schema))
                    gathered = []
            if gathered:
                writer.write_table(pa.Table.from_batches(gathered, self._schema))
        return finished


def _compressed(data: bytes, compression: Compression) -> bytes:
    match compression:
        case Compression.GZIP:
            return gzip.compress(data, mtime=0)
        case Compression.ZSTD:
            return zstd.compress(data)
    return data


def _cell(value: object) -> object:
    if isinstance(value, list | dict | np.ndarray):
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return value


def _typed(value: object, kind: pa.DataType) -> object:
    # A column kept from JSON has any values; its type in the output is text.
    if pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return orjson.dumps(value).decode()
    return value
