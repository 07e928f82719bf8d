"""Contracts of the tars: same members give same bytes, and every damage is heard of."""

import hashlib
import io
import pickle
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.shards import (
    TarIndex,
    TornShard,
    hole,
    key_digest,
    read_tar,
    sample_key,
    scan_tar,
    shard_name,
    split_name,
    write_tar,
)

_MEMBERS = [(f"{sample_key(3, n)}.txt", b"x" * (n * 300)) for n in range(5)]
_names = st.text("abcxyz0189._-/", min_size=1, max_size=90).filter(lambda n: n.strip("./"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(_names, st.binary(max_size=1500)), unique_by=lambda m: m[0].strip("/")))
def test_any_members_come_back_in_order(members: list[tuple[str, bytes]]) -> None:
    data = write_tar(members)
    assert list(read_tar(data)) == members
    assert write_tar(members) == data


def test_the_standard_library_reads_what_we_write() -> None:
    with tarfile.open(fileobj=io.BytesIO(write_tar(_MEMBERS))) as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == _MEMBERS
        assert all(m.mtime == m.uid == m.gid == 0 for m in tar)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_are_read(form: int) -> None:
    names = ["short.txt", "d/" * 20 + "k" * (90 if form == tarfile.USTAR_FORMAT else 150) + ".txt"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 3, 12345.5
            tar.addfile(info, io.BytesIO(b"abc"))
    assert list(read_tar(buffer.getvalue())) == [(name, b"abc") for name in names]


def test_a_cut_at_every_block_is_torn() -> None:
    data = write_tar(_MEMBERS)
    for length in [*range(0, len(data), 512), len(data) - 1]:
        with pytest.raises(TornShard, match="label/shard-7"):
            list(read_tar(data[:length], source="label/shard-7"))


@pytest.mark.parametrize("zeros", [0, 512])
def test_a_cut_at_the_end_of_a_record_of_other_writers_is_torn(zeros: int) -> None:
    """There the rest could be taken for their padding."""
    data = write_tar([("a.txt", b"x" * (10_240 - 512 - zeros))])
    assert len(list(read_tar(data))) == 1
    with pytest.raises(TornShard, match="truncated"):
        list(read_tar(data[:10_240]))


@pytest.mark.parametrize(("extended", "message"), [
    (b"12 path=a/bX", "damaged extended header"),
    (b"99 path=a/b", "damaged extended header"),
    (b"path=a/b", "damaged extended header"),
    (b"10 size=1\n", "8 GiB"),
])  # fmt: skip
def test_an_extended_header_that_cannot_be_followed_is_torn(extended: bytes, message: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, form, payload in (("x", b"x", extended), ("a.txt", b"0", b"abc")):
            info = tarfile.TarInfo(name)
            info.type, info.size = form, len(payload)
            tar.addfile(info, io.BytesIO(payload))
    with pytest.raises(TornShard, match=message):
        scan_tar(buffer.getvalue())


def test_releases_write_the_same_bytes() -> None:
    data = write_tar([(f"{sample_key(3, 1)}.txt", b"abc")])
    assert hashlib.sha256(data).hexdigest() == (
        "e9f98706b0c30b180f746b83128a3ec3cdde9a68a3df2ed07b22dbc5baa98a20"
    )


def test_every_flipped_header_or_padding_byte_is_torn() -> None:
    data = bytearray(write_tar(_MEMBERS[:2]))
    payload = range(1024 + 0, 1024 + 300)
    for at in set(range(len(data))) - set(payload):
        data[at] ^= 0x11
        with pytest.raises(TornShard):
            list(read_tar(bytes(data)))
        data[at] ^= 0x11


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_bytes_make_the_reader_fail_otherwise(data: st.DataObject) -> None:
    tar = bytearray(write_tar(_MEMBERS[:3]))
    for _ in range(data.draw(st.integers(1, 5))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    try:
        list(read_tar(bytes(tar)))
    except TornShard:
        pass


def test_a_flipped_payload_bit_is_found_by_the_digest() -> None:
    data = bytearray(write_tar(_MEMBERS))
    digest = hashlib.sha256(data).hexdigest()
    assert len(list(read_tar(bytes(data), sha256=digest))) == 5
    data[1024 + 100] ^= 1
    with pytest.raises(TornShard, match="sha256"):
        list(read_tar(bytes(data), sha256=digest))


@pytest.mark.parametrize("tail", [b"x", b"\0", b"\0" * 512, b"junk" * 128])
def test_trailing_bytes_are_torn(tail: bytes) -> None:
    with pytest.raises(TornShard, match="behind"):
        list(read_tar(write_tar(_MEMBERS) + tail))


def _extended(payload: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    header = tarfile.TarInfo("././@PaxHeader")
    header.size, header.type = len(payload), kind
    return header.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512)


def test_extended_headers_are_read_in_a_moment_and_endless_ones_refused() -> None:
    file = write_tar([("a.txt", b"x")])
    records = b"6 a=b\n" * 170_000
    began = time.monotonic()
    assert dict(read_tar(_extended(records) + file)) == {"a.txt": b"x"}
    assert time.monotonic() - began < 5  # minutes, where what is left is copied for each record
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        with pytest.raises(TornShard, match="extended header of 1200000 bytes"):
            scan_tar(_extended(bytes(1_200_000), kind) + file)


def test_the_long_name_of_a_folder_is_not_that_of_the_file_behind_it() -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            folder = tarfile.TarInfo("f" * 150)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
        assert [member.name for member in scan_tar(buffer.getvalue())] == ["a.txt"]


@pytest.mark.parametrize("record", [b"22 GNU.sparse.major=1\n", b"14 path=a.txt\n10 size=1\n"])
def test_members_whose_bytes_are_not_what_lies_there_are_refused(record: bytes) -> None:
    with pytest.raises(TornShard, match="not supported"):
        scan_tar(_extended(record) + write_tar([("a.txt", b"x")]))


def test_links_are_refused() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(TornShard, match="link"):
        scan_tar(buffer.getvalue())


@pytest.mark.parametrize("names", [["a.x", "a.x"], ["ü.x"], [""], ["a" * 200]])
def test_names_that_cannot_be_stored_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="name"):
        write_tar((name, b"") for name in names)


def test_the_index_reads_by_key_and_knows_holes(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(write_tar([*_MEMBERS, hole("k", "too dark")]))
    index = pickle.loads(pickle.dumps(TarIndex(path)))
    assert index.keys == [split_name(name)[0] for name, _ in _MEMBERS] + ["k"]
    assert index.read(sample_key(3, 4)) == b"x" * 1200
    assert (index.ext("k"), index.ext(sample_key(3, 0))) == ("missing", "txt")
    with pytest.raises(KeyError, match="too dark"):
        index.read("k")
    assert "k" in index
    assert "l" not in index
    with pytest.raises(TornShard, match="sha256"):
        TarIndex(path, sha256="0" * 64)


def test_the_index_refuses_two_members_of_a_key_and_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(write_tar([("a.jpg", b""), ("a.txt", b"")]))
    with pytest.raises(TornShard, match="twice"):
        TarIndex(path)
    path.write_bytes(b"")
    with pytest.raises(TornShard, match="empty"):
        TarIndex(path)


def test_names_sort_as_the_plan_does() -> None:
    assert sample_key(12, 345) == "00001200345"
    assert shard_name(123) == "shard-000123"
    assert key_digest(["a", "b"]) != key_digest(["b", "a"])
    for shard, row in ((0, 100_000), (1_000_000, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="outside"):
            sample_key(shard, row)
