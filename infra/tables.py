"""Parquet tables of a shard: small, and read by whoever asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes; only some of the columns if so asked.

    Arrow's own threads stay out of it. They gain nothing for tables of some thousand rows, compete
    with the worker's, and now and then abort a process that ends soon afterwards.

    Raises:
        pa.ArrowException: the bytes are no Parquet file.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
