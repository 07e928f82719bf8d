"""Small Parquet tables are read whole, in part, and by the calling thread alone."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from infra.tables import read_table

TABLE = pa.table({"key": ["a", "b"], "number": pa.array([1, None], pa.int32())})


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def test_a_table_is_read_as_it_was_written_or_only_some_columns_of_it():
    assert read_table(written(TABLE)) == TABLE
    assert read_table(written(TABLE), ["number"]) == TABLE.select(["number"])


def test_reading_starts_no_thread_that_could_outlive_the_process():
    code = (
        "import sys, psutil; from infra.tables import read_table\n"
        "data = sys.stdin.buffer.read(); before = psutil.Process().num_threads()\n"
        "for _ in range(20): read_table(data)\n"
        "sys.exit(psutil.Process().num_threads() - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], input=written(TABLE)).returncode == 0
