"""Rows of Parquet files, and of the Arrow files in which Hugging Face's `datasets` saves a dataset; as a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from memorizing.data.documents import damaged
from memorizing.data.formats import archives
from memorizing.data.formats.archives import Member
from memorizing.errors import first_line

PARQUET = ".parquet"
ARROW = ".arrow"
MISSING = "table, which needs pip install 'memorizing[documents]'"
# What `datasets` keeps of its own work beside a dataset.
CACHE_PREFIX = "cache-"

_ROWS = 64


def rows(member: Member, suffix: str, columns: list[str], skipped: Counter[str]) -> Iterator[tuple[int, list[Any]]]:
    """Yields the values of some columns, and of each row its number, from 1.

    Args:
      member: the file.
      suffix: its kind, `PARQUET` or `ARROW`.
      columns: their names.
      skipped: counts what was left out, by reason.
    """
    try:
        import pyarrow as pa
    except ImportError:
        skipped[MISSING] += 1
        return
    number = 0
    try:
        with member.open() as file:
            for batch in _batches(file, suffix, columns):
                values = [batch.column(name).to_pylist() for name in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, list(row)
    except (pa.ArrowException, ValueError, *archives.READ_ERRORS) as error:
        skipped[damaged(member.label, first_line(error))] += 1


def _batches(file: Any, suffix: str, columns: list[str]) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    if suffix == PARQUET:
        table = parquet.ParquetFile(file)
        _check_columns(columns, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=_ROWS, columns=columns)
        return
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        # The other layout of Arrow.
        file.seek(0)
        stream = pa.ipc.open_file(file)
        _check_columns(columns, stream.schema.names)
        yield from map(stream.get_batch, range(stream.num_record_batches))
        return
    _check_columns(columns, stream.schema.names)
    yield from stream


def _check_columns(wanted: list[str], there: list[str]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"no column {missing[0]!r}, only {', '.join(there)}")
