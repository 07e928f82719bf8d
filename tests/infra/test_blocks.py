"""Contracts of the token shards: exact round trips, counted holes, no silent damage."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.blocks import BlockReader, BlockWriter, Column, is_blocks
from infra.shards import TornShard, read_tar, scan_tar, write_tar

_U16 = st.integers(0, 2**16 - 1)
_samples = st.lists(
    st.tuples(
        st.none() | st.lists(_U16, min_size=3, max_size=3),
        st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=6),
    ),
    max_size=11,
)


def _write(samples: list[tuple], block_size: int = 4) -> bytes:
    columns = {"crop0": Column("uint16", 3), "words": Column("uint32")}
    writer = BlockWriter(columns, {"tokenizer": "depth@12345678"}, block_size)
    for number, (dense, words) in enumerate(samples):
        writer.add(f"{number:011d}", {"crop0": dense, "words": words})
    return writer.finish()


@settings(max_examples=60, deadline=None)
@given(_samples)
def test_any_samples_come_back_with_their_holes(samples: list[tuple]) -> None:
    data = _write(samples)
    assert data == _write(samples)
    reader = BlockReader.from_bytes(data)
    assert reader.keys == [f"{n:011d}" for n in range(len(samples))]
    assert reader.num_rows == len(reader) == len(samples)
    dense, valid = reader.fixed("crop0")
    assert dense.shape == (len(samples), 3)
    assert valid.tolist() == [sample[0] is not None for sample in samples]
    assert dense.tolist() == [sample[0] or [0, 0, 0] for sample in samples]
    rows = np.arange(len(samples))[::-1]
    assert np.array_equal(reader.fixed_rows("crop0", rows), dense[rows])
    values, offsets, valid = reader.ragged_arrays("words")
    assert valid.tolist() == [sample[1] is not None for sample in samples]
    for row, (_, words) in enumerate(samples):
        assert reader.ragged("words", row).tolist() == (words or [])
        assert values[offsets[row] : offsets[row + 1]].tolist() == (words or [])


def test_columns_and_metadata_travel(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(_write([([1, 2, 3], [4])] * 5))
    reader = pickle.loads(pickle.dumps(BlockReader(path)))
    assert reader.columns == {"crop0": Column("uint16", 3), "words": Column("uint32")}
    assert reader.metadata == {"tokenizer": "depth@12345678"}
    assert reader.fixed("crop0")[0].dtype == np.uint16


def test_reading_copies_nothing_and_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(_write([([1, 2, 3], [4, 5])] * 4))
    before = pa.total_allocated_bytes()
    reader = BlockReader(path)
    tokens, words = reader.fixed("crop0")[0], reader.ragged("words", 1)
    assert pa.total_allocated_bytes() == before
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert not words.flags.owndata
    assert tokens.ctypes.data % 8 == 0
    assert all(member.offset % 512 == 0 for member in scan_tar(path.read_bytes()))


def test_blocks_hold_256_samples_in_little_more_than_the_raw_size() -> None:
    writer = BlockWriter({f"crop{n}": Column("uint16", 196) for n in range(8)}, {})
    tokens = np.arange(196)
    for number in range(600):
        writer.add(f"{number:011d}", {f"crop{n}": tokens for n in range(8)})
    data = writer.finish()
    assert [m.name for m in scan_tar(data)] == [f"block-{n:05d}.arrow" for n in range(3)]
    assert len(data) < 1.02 * 600 * 8 * 196 * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"crop0": [1, 2], "words": []}, "2 tokens, not 3"),
        ({"crop0": [1, 2, 65536], "words": []}, "outside uint16"),
        ({"crop0": [1, 2, 3], "words": [-1]}, "outside uint32"),
        ({"crop0": [0.5, 2, 3], "words": []}, "not a list of tokens"),
        ({"crop0": [[1, 2, 3]], "words": []}, "not a list of tokens"),
        ({"crop0": [1, 2, 3]}, "columns"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict, message: str) -> None:
    writer = BlockWriter({"crop0": Column("uint16", 3), "words": Column("uint32")}, {})
    with pytest.raises(ValueError, match=message):
        writer.add("k", row)
    writer.add("k", {"crop0": [1, 2, 3], "words": None})
    with pytest.raises(ValueError, match="twice"):
        writer.add("k", {"crop0": [1, 2, 3], "words": None})


def test_damage_is_torn_and_never_a_crash(tmp_path: Path) -> None:
    data = _write([([1, 2, 3], [4, 5])] * 9)
    path = tmp_path / "x.tar"
    for length in range(0, len(data), 512):
        path.write_bytes(data[:length])
        with pytest.raises(TornShard, match=r"x\.tar"):
            BlockReader(path)
    flipped = bytearray(data)
    digest = hashlib.sha256(data).hexdigest()
    for at in range(512, len(data), 61):
        flipped[at] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(TornShard):
            BlockReader(path, sha256=digest)
        flipped[at] ^= 0xFF


@settings(max_examples=150, deadline=None)
@example(at=1508, flip=128)  # a name of a column that is no UTF-8
@example(at=1544, flip=104)  # two columns of one name
@given(at=st.integers(512, 3071), flip=st.integers(1, 255))
def test_no_flipped_byte_makes_the_reader_fail_otherwise(at: int, flip: int) -> None:
    tar = bytearray(_write([([1, 2, 3], [4, 5]), (None, None)]))
    tar[at] ^= flip
    try:
        reader = BlockReader.from_bytes(bytes(tar))
        _ = reader.keys, reader.metadata
        for column, kind in reader.columns.items():
            _ = reader.fixed(column) if kind.length else reader.ragged_arrays(column)
    except TornShard:
        pass


def test_blocks_that_disagree_and_other_tars_are_refused() -> None:
    blocks = [payload for _, payload in read_tar(_write([([1, 2, 3], [])]))]
    other = BlockWriter({"crop0": Column("uint16", 2)}, {}).finish()
    blocks += [payload for _, payload in read_tar(other)]
    mixed = write_tar((f"block-{n:05d}.arrow", block) for n, block in enumerate(blocks))
    with pytest.raises(TornShard, match="differ"):
        BlockReader.from_bytes(mixed)
    labels = write_tar([("a.txt", b"")])
    assert not is_blocks(scan_tar(labels))
    with pytest.raises(TornShard, match="not a token shard"):
        BlockReader.from_bytes(labels)


def test_wrong_columns_and_rows_are_named() -> None:
    reader = BlockReader.from_bytes(_write([([1, 2, 3], [4])]))
    with pytest.raises(ValueError, match="no column 'crop9'"):
        reader.fixed("crop9")
    with pytest.raises(ValueError, match="use ragged"):
        reader.fixed("words")
    with pytest.raises(ValueError, match="use fixed"):
        reader.ragged("crop0", 0)
    for rows in ([1], [-1]):
        with pytest.raises(IndexError):
            reader.fixed_rows("crop0", rows)
        with pytest.raises(IndexError):
            reader.ragged("words", rows[0])
    for column in ({"dtype": "int8"}, {"dtype": "uint16", "length": 0}):
        with pytest.raises(ValueError, match="column"):
            Column(**column)
