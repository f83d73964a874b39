"""The data files of an inventory: CSV compressed by gzip, or Parquet compressed by Snappy.

A file grows in memory, and is stored when it is full. ``add`` and ``end`` compress: they are called in a thread.
"""

from __future__ import annotations

import importlib.util
import io
import zlib
from collections.abc import Sequence
from typing import Any, Final, Protocol
from urllib.parse import quote

from storaged.objects.configuration.inventory import PARQUET, Inventory
from storaged.s3 import xml
from storaged.s3.inventory.columns import FLAG, INT, TEXT, TIME, Column, Value, columns_of
from storaged.units import MIB

BYTES_MAX: Final = 16 * MIB
"""A file is full when its compressed part has this many bytes."""
ROWS_MAX: Final = 500_000
GROUP_ROWS: Final = 10_000
GROUP_CHARS: Final = 8 * MIB
"""Of a row group of Parquet, which is in memory until it is compressed. An access control list has up to 18 KB."""
PYARROW: Final = (
    "Inventories as Parquet need pyarrow, which this gateway does not have: pip install 'storaged[inventory]'."
)


class DataFile(Protocol):
    """``size``: bytes so far. ``extension``: of its name."""

    extension: str
    rows: int

    @property
    def size(self) -> int: ...

    def add(self, rows: Sequence[Sequence[Value]]) -> None: ...

    def end(self) -> bytes:
        """The whole file. Nothing may be added after that."""


def has_parquet() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def data_file(report: Inventory) -> DataFile:
    columns = columns_of(report)
    return ParquetFile(columns) if report.format == PARQUET else CsvFile(columns)


class CsvFile:
    """Every value is quoted, there is no line of names, and keys are URL-encoded, as AWS writes them."""

    extension = "csv.gz"

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._packer = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._packed = bytearray()
        self.rows = 0

    @property
    def size(self) -> int:
        return len(self._packed)

    def add(self, rows: Sequence[Sequence[Value]]) -> None:
        text = "".join(map(self._line, rows))
        self._packed += self._packer.compress(text.encode())
        self.rows += len(rows)

    def _line(self, row: Sequence[Value]) -> str:
        cells = [_cell(column, value) for column, value in zip(self._columns, row, strict=True)]
        return '"' + '","'.join(cells) + '"\n'

    def end(self) -> bytes:
        self._packed += self._packer.flush()
        return bytes(self._packed)


def _cell(column: Column, value: Value) -> str:
    if value is None:
        return ""
    if column.name == "Key":
        return quote(str(value), safe="/")  # a client may decode a plus sign as a space: there is none
    if column.kind == TIME:
        return xml.iso_time(int(value))
    if column.kind == FLAG:
        return "true" if value else "false"
    return str(value).replace('"', '""')


class ParquetFile:
    extension = "parquet"

    def __init__(self, columns: Sequence[Column]) -> None:
        """Raises ImportError without pyarrow."""
        import pyarrow  # an optional extra, which takes 50 MB: only now
        import pyarrow.parquet

        self._arrow: Any = pyarrow
        kinds = {
            TEXT: pyarrow.string(),
            INT: pyarrow.int64(),
            TIME: pyarrow.timestamp("ms", tz="UTC"),
            FLAG: pyarrow.bool_(),
        }
        self._schema: Any = pyarrow.schema(
            [pyarrow.field(column.snake, kinds[column.kind], nullable=not column.required) for column in columns]
        )
        self._sink = io.BytesIO()
        self._writer: Any = pyarrow.parquet.ParquetWriter(self._sink, self._schema, compression="snappy")
        self._waiting: list[Sequence[Value]] = []
        self._waiting_chars = 0
        self.rows = 0

    @property
    def size(self) -> int:
        return self._sink.tell()

    def add(self, rows: Sequence[Sequence[Value]]) -> None:
        self._waiting += rows
        self._waiting_chars += sum(len(value) for row in rows for value in row if isinstance(value, str))
        self.rows += len(rows)
        if len(self._waiting) >= GROUP_ROWS or self._waiting_chars >= GROUP_CHARS:
            self._write_group()

    def _write_group(self) -> None:
        values = list(zip(*self._waiting, strict=True)) or [()] * len(self._schema)
        arrays = [self._arrow.array(column, field.type) for column, field in zip(values, self._schema, strict=True)]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._waiting, self._waiting_chars = [], 0

    def end(self) -> bytes:
        if self._waiting:
            self._write_group()
        self._writer.close()
        return self._sink.getvalue()
