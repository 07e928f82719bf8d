"""Lists in every form become the same rows; what is malformed keeps its place and says why."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.shards import write_tar
from infra.sources import MAX_LINE, Row, Source, detect, read_rows
from infra.store import Store

URLS = [f"http://example.org/{i}.jpg" for i in range(3)]
TEXTS = ["a cat", "two,\tdogs", 'a "bird"\nin a tree']


def rows(path: Path | str, **words: object) -> list[Row]:
    return list(read_rows(detect(Source(path=str(path), **words))))


def seen(found: list[Row]) -> list[tuple[str, str]]:
    return [(row.url, row.caption) for row in found]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


CSV = "id,url,caption\n" + "".join(
    f"{i},{url},{quoted(text)}\n" for i, (url, text) in enumerate(zip(URLS, TEXTS, strict=True))
)
JSONL = "".join(
    json.dumps({"url": u, "caption": t, "id": i}) + "\n"
    for i, (u, t) in enumerate(zip(URLS, TEXTS, strict=True))
)


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize(("name", "content"), [("l.csv", CSV), ("l.jsonl", JSONL)])
def test_text_lists_plain_and_compressed_give_the_same_rows(
    tmp_path: Path, name: str, content: str, pack: str
) -> None:
    packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}
    file = tmp_path / f"{name}{pack}"
    file.write_bytes(packers[pack](content.encode()))
    assert seen(rows(file)) == list(zip(URLS, TEXTS, strict=True))


@pytest.fixture
def bucket(s3_url: str) -> str:
    """An empty folder of a bucket."""
    return f"{s3_url}/{uuid.uuid4().hex}"


def put(path: str, data: bytes) -> None:
    Store(path.rpartition("/")[0]).write(path.rpartition("/")[2], data)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("l.tsv", ""), ("l.tsv", ".gz"), ("l.csv", ""), ("l.csv", ".zst"), ("l.jsonl", ".gz"),
     ("l.parquet", "")],
)  # fmt: skip
def test_lists_in_a_bucket_give_the_same_rows(bucket: str, name: str, pack: str) -> None:
    if name == "l.parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"url": URLS, "caption": TEXTS}), sink, compression="zstd")
        put(f"{bucket}/{name}", sink.getvalue().to_pybytes())
    else:
        tsv = "".join(f"{u}\tpicture {i}\n" for i, u in enumerate(URLS))
        content = {"l.tsv": tsv, "l.csv": CSV, "l.jsonl": JSONL}[name].encode()
        packed = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[pack](content)
        put(f"{bucket}/{name}{pack}", packed)
    found = seen(rows(f"{bucket}/{name}{pack}"))
    assert [url for url, _ in found] == URLS
    assert name == "l.tsv" or [text for _, text in found] == TEXTS


def test_patterns_folders_and_tars_of_a_bucket_are_found(bucket: str) -> None:
    for number, url in enumerate(URLS):
        put(f"{bucket}/parts/{number}.jsonl", json.dumps({"url": url, "caption": ""}).encode())
    assert [row.url for row in rows(f"{bucket}/parts/*.jsonl")] == URLS
    assert [row.url for row in rows(f"{bucket}/parts")] == URLS
    for name in ("b/2.png", "b/1.jpg", "b/1.txt", "a.jpeg"):
        put(f"{bucket}/pictures/{name}", b"x")
    found = rows(f"{bucket}/pictures")
    assert [(r.url, r.sidecar) for r in found] == [
        ("a.jpeg", ""), ("b/1.jpg", "b/1.txt"), ("b/2.png", ""),
    ]  # fmt: skip
    put(f"{bucket}/tars/00000.tar", write_tar([]))
    assert [row.url for row in rows(f"{bucket}/tars")] == [f"{bucket}/tars/00000.tar"]


def test_a_list_that_is_not_in_the_bucket_or_torn_is_named(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        rows(f"{bucket}/none.csv")
    put(f"{bucket}/l.jsonl.gz", gzip.compress(JSONL.encode() * 1000)[:-40])
    with pytest.raises(ValueError, match=r"l\.jsonl\.gz"):
        rows(f"{bucket}/l.jsonl.gz")


def test_parquet_gives_the_same_rows_from_one_file_and_from_several(tmp_path: Path) -> None:
    table = pa.table({"id": [0, 1, 2], "caption": TEXTS, "url": URLS})
    pq.write_table(table, tmp_path / "all.parquet")
    (tmp_path / "parts").mkdir()
    pq.write_table(table.slice(0, 1), tmp_path / "parts" / "a.parquet")
    pq.write_table(table.slice(1), tmp_path / "parts" / "b.parquet")
    expected = list(zip(URLS, TEXTS, strict=True))
    for path in ("all.parquet", "parts", "parts/*.parquet"):
        assert seen(rows(tmp_path / path)) == expected
    extra = rows(tmp_path / "all.parquet", extra=("id",))[2].extra
    assert json.loads(extra) == {"id": 2}


def test_columns_are_chosen_by_name_or_by_number(tmp_path: Path) -> None:
    tsv = tmp_path / "cc3m.tsv"
    tsv.write_text("a cat\thttp://a/1.jpg\t0.5\n")
    (row,) = rows(tsv, url="2", caption="1", extra=("3",))
    assert (row.url, row.caption, row.extra) == ("http://a/1.jpg", "a cat", '{"3": "0.5"}')
    named = tmp_path / "named.tsv"
    named.write_text("score\tURL\tTEXT\n1\thttp://a/1.jpg\ta cat\n")
    assert seen(rows(named, url="URL", caption="TEXT")) == [("http://a/1.jpg", "a cat")]
    assert seen(rows(named, url="URL", caption="-")) == [("http://a/1.jpg", "")]


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.parquet"])
def test_a_wrong_column_is_an_error_that_lists_those_there_are(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"id": [0], "url": ["u"], "caption": ["c"]}), file)
    else:
        file.write_text(CSV if name.endswith("csv") else JSONL)
    with pytest.raises(ValueError, match=r"no column 'link'; it has .*caption"):
        rows(file, url="link")


BAD_LINES = {
    "l.csv": ["url,caption", "u1,c1", "only", 'u2,"c2" x', "u3,c3", ",c4"],
    "l.jsonl": [
        '{"url": "u1", "caption": "c1"}', "{", "[1]", '{"url": 3, "caption": "x"}',
        '{"url": "u2", "caption": ["x"]}', '{"url": "u3", "caption": "c3"}', "[" * 100_000,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_row_keeps_its_place_and_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n".join(BAD_LINES[name]) + "\n")
    found = rows(tmp_path / name)
    good = {row.url for row in found if not row.problem}
    assert good == {"u1", "u3"}
    assert len(found) == len(BAD_LINES[name]) - (name == "l.csv")


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.tsv"])
def test_the_mark_that_some_programs_begin_a_file_with_belongs_to_no_row(
    tmp_path: Path, name: str
) -> None:
    lines = {"l.csv": "url,caption\r\nu1,c1\r\n", "l.tsv": "u1\tc1\r\n",
             "l.jsonl": '{"url": "u1", "caption": "c1"}\r\n'}  # fmt: skip
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines[name].encode())
    assert seen(rows(tmp_path / name)) == [("u1", "c1")]


def test_half_a_character_of_json_is_replaced_in_every_column(tmp_path: Path) -> None:
    line = r'{"url": "u\ud83d", "caption": "a cat \ud83d", "by": "\udc00"}'
    (tmp_path / "l.jsonl").write_text(line + "\n")
    (row,) = rows(tmp_path / "l.jsonl", extra=("by",))
    assert (row.url, row.caption, json.loads(row.extra)) == ("u?", "a cat ?", {"by": "?"})


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_a_column_that_is_there_twice_is_an_error(tmp_path: Path, name: str) -> None:
    columns = [pa.array([text]) for text in ("u1", "c1", "u2")]
    pq.write_table(pa.table(columns, names=["url", "caption", "url"]), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("url,caption,url\nu1,c1,u2\n")
    with pytest.raises(ValueError, match=rf"{name} has 2 columns 'url'"):
        rows(tmp_path / name)


def test_a_parquet_file_that_is_damaged_within_is_named(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": [f"u{i}" for i in range(9000)], "caption": ["c"] * 9000}), file)
    data = bytearray(file.read_bytes())
    data[500:900] = bytes(400)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"l\.parquet cannot be read"):
        rows(file)


def test_compressed_tars_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match="decompress it first"):
        rows(tmp_path / "set.tar.gz")


@pytest.mark.parametrize(("end", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_parquet_that_was_compressed_as_a_whole_gives_the_same_rows(
    tmp_path: Path, end: str, pack: Callable[[bytes], bytes]
) -> None:
    pq.write_table(pa.table({"url": URLS, "caption": TEXTS}), tmp_path / "l.parquet")
    file = tmp_path / f"l.parquet.{end}"
    file.write_bytes(pack((tmp_path / "l.parquet").read_bytes()))
    assert rows(file) == rows(tmp_path / "l.parquet")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"parquet.{end} "):
        rows(file)


def test_an_endless_line_is_one_bad_row_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "l.tsv"
    with file.open("w") as stream:
        stream.write("http://a/1.jpg\tx\n")
        for _ in range(64):
            stream.write("x" * MAX_LINE)
        stream.write("\nhttp://a/2.jpg\ty\n")
    tracemalloc.start()
    found = rows(file)
    assert tracemalloc.get_traced_memory()[1] < 16 * MAX_LINE
    tracemalloc.stop()
    assert [bool(row.problem) for row in found] == [False, True, False]


def test_a_torn_compressed_list_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl.gz"
    file.write_bytes(gzip.compress(JSONL.encode() * 1000)[:-40])
    with pytest.raises(ValueError, match=r"l\.jsonl\.gz"):
        rows(file)
    (tmp_path / "l.parquet").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a Parquet file"):
        rows(tmp_path / "l.parquet")


def test_a_folder_is_read_in_a_stable_order_with_the_captions_beside(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "b/1.txt", "a.jpeg", "a.json", "notes.md", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = rows(tmp_path)
    assert [(r.url, r.sidecar) for r in found] == [
        ("a.jpeg", "a.json"), ("b/1.jpg", "b/1.txt"), ("b/2.PNG", ""),
    ]  # fmt: skip


def test_links_to_files_are_read_as_files_also_broken_ones(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    (blobs / "0a1b").write_bytes(write_tar([("k.jpg", b"x")]))
    (folder / "0.tar").symlink_to(blobs / "0a1b")
    assert [row.url for row in rows(folder)] == [f"file://{folder}/0.tar"]
    (folder / "a.jpg").symlink_to(blobs / "0a1b")
    (folder / "b.jpg").symlink_to(blobs / "gone")
    assert [row.url for row in rows(folder, format="folder")] == ["a.jpg", "b.jpg"]


def test_a_name_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (row,) = rows(tmp_path, format="folder")
    assert (row.url, row.problem) == ("?.jpg", "the name is not UTF-8")


def test_the_format_is_told_from_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(write_tar([]))
    assert detect(Source(path=str(tmp_path))).format == "webdataset"
    assert [r.url for r in rows(tmp_path)] == [f"file://{tmp_path}/00000.tar"]
    assert detect(Source(path="x/part-*.parquet")).format == "parquet"
    assert detect(Source(path="x.tsv.zst")).format == "tsv"
    with pytest.raises(ValueError, match="choose tsv, csv"):
        detect(Source(path="x.xlsx"))
    with pytest.raises(ValueError, match="no columns to choose"):
        detect(Source(path="x.tar", url="a"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=8))
def test_any_text_survives_json_lines(tmp_path_factory, pairs) -> None:
    file = tmp_path_factory.mktemp("any") / "l.jsonl"
    lines = [json.dumps({"url": u, "caption": c}) for u, c in pairs]
    file.write_text("".join(line + "\n" for line in lines))
    found = rows(file)
    assert [row.caption for row in found if not row.problem] == [
        c for u, c in pairs if u.strip()
    ]
    assert len(found) == len(pairs)


def test_a_value_of_parquet_that_python_has_no_word_for_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    urls = pa.array(["http://a/1", "http://a/2"])
    for taken, good in (
        (pa.array([10**9, 1], pa.date32()), 1),
        (pa.array([1, 1], pa.timestamp("us", tz="Nowhere/At_All")), 0),
    ):
        pq.write_table(pa.table({"url": urls, "caption": urls, "taken": taken}), path)
        rows = list(read_rows(Source(path=str(path), format="parquet", extra=("taken",))))
        assert [bool(row.problem) for row in rows] == [True, not good]
        assert rows[0].problem.startswith("no value: ")
