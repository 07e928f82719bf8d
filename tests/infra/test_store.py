"""Contracts of the store: whole objects, put-if-absent, compare-and-swap, honest listings."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import backends
from infra.backends import S3Backend
from infra.store import Store, StoreConflict, json_bytes


def test_an_object_comes_back_as_written(tmp_store: Store) -> None:
    tmp_store.write("a/b.bin", b"one")
    tmp_store.write("a/b.bin", b"three")
    assert tmp_store.read("a/b.bin") == b"three"
    assert tmp_store.size("a/b.bin") == 5
    assert tmp_store.exists("a/b.bin")
    assert not tmp_store.exists("a")
    tmp_store.delete("a/b.bin")
    tmp_store.delete("a/b.bin")
    assert not tmp_store.exists("a/b.bin")


def test_a_missing_object_is_named_by_its_url(tmp_store: Store) -> None:
    for access in (tmp_store.read, tmp_store.size, tmp_store.local, tmp_store.read_json):
        with pytest.raises(FileNotFoundError, match=r"gone/x\.json") as caught:
            access("gone/x.json")
        assert tmp_store.url in str(caught.value)
    assert tmp_store.version("gone/x.json") is None


def test_create_lets_exactly_one_writer_win(tmp_store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda n: tmp_store.create("c/x", b"%d" % n), range(16)))
    assert sum(wins) == 1
    assert tmp_store.read("c/x") == b"%d" % wins.index(True)


def test_replace_refuses_a_stale_version(tmp_store: Store) -> None:
    tmp_store.replace("m/CURRENT", b"1", None)
    first = tmp_store.version("m/CURRENT")
    tmp_store.replace("m/CURRENT", b"2", first)
    for stale in (first, None):
        with pytest.raises(StoreConflict, match="m/CURRENT"):
            tmp_store.replace("m/CURRENT", b"3", stale)
    with pytest.raises(StoreConflict):
        tmp_store.replace("m/ABSENT", b"3", first)
    assert tmp_store.read("m/CURRENT") == b"2"


def test_replace_counts_every_increment_of_concurrent_writers(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("n", b"0")

    def increment(_: int) -> None:
        while True:
            version, value = store.version("n"), int(store.read("n"))
            try:
                return store.replace("n", b"%d" % (value + 1), version)
            except StoreConflict:
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(20)))
    # The value is read after its version, so a lost update would show as a smaller sum.
    assert int(store.read("n")) == 20


def test_a_listing_is_sorted_and_takes_any_prefix(tmp_store: Store) -> None:
    names = ["s/label:depth@ab/shard-1.tar", "s/label:depth@ab/shard-2.tar", "s/x", "t"]
    for name in reversed(names):
        tmp_store.create(name, name.encode())
    assert tmp_store.list("") == names
    assert tmp_store.list("s/") == names[:3]
    assert tmp_store.list("s/label:depth@ab/shard-1") == names[:1]
    assert tmp_store.list("nothing/") == []
    assert tmp_store.sizes("t") == {"t": 1}


def test_a_pickled_store_opens_the_same_root(tmp_store: Store) -> None:
    tmp_store.write("x", b"1")
    assert pickle.loads(pickle.dumps(tmp_store)).read("x") == b"1"


def test_a_local_copy_has_the_recorded_content(tmp_store: Store) -> None:
    from hashlib import sha256

    tmp_store.write("x.tar", b"payload")
    digest = sha256(b"payload").hexdigest()
    assert tmp_store.local("x.tar", digest).read_bytes() == b"payload"
    assert tmp_store.local("x.tar").read_bytes() == b"payload"
    tmp_store.write("x.tar", b"changed")
    assert tmp_store.local("x.tar").read_bytes() == b"changed"


def test_a_download_that_differs_from_its_digest_is_refused(s3_url: str) -> None:
    store = Store(f"{s3_url}/tampered")
    store.write("x", b"tampered")
    with pytest.raises(ValueError, match="does not have sha256"):
        store.local("x", "0" * 64)


def test_a_copy_that_is_asked_for_again_counts_as_used(s3_url: str) -> None:
    store = Store(f"{s3_url}/copies")
    store.write("a.bin", b"content")
    copy = store.local("a.bin")
    os.utime(copy, (1.0, 1.0))
    assert store.local("a.bin") == copy
    assert copy.stat().st_mtime > time.time() - 3600


def test_json_is_canonical_and_a_broken_one_is_named(tmp_store: Store) -> None:
    assert tmp_store.create_json("a.json", {"b": 1, "a": "ü"})
    assert not tmp_store.create_json("a.json", {})
    tmp_store.write_json("b.json", {"a": "ü", "b": 1})
    assert tmp_store.read("a.json") == tmp_store.read("b.json")
    tmp_store.write("a.json", b"{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        tmp_store.read_json("a.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../../b", "", "a\0b"])
def test_paths_cannot_leave_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="not a relative path"):
        Store(str(tmp_path)).read(path)


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "https://x/y"])
def test_urls_of_other_kinds_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"bucket|neither"):
        Store(url)


def test_an_address_that_would_put_all_objects_into_one_key_is_refused() -> None:
    with pytest.raises(ValueError, match="names a version of an object"):
        Store("s3://bucket/set?versionId=1")


def test_equal_json_is_equal_bytes_of_every_release() -> None:
    expected = '{\n "a": "é",\n "b": [\n  1\n ]\n}\n'
    assert json_bytes({"b": (1,), "a": "é"}) == expected.encode()


def test_paths_and_file_urls_name_the_same_root(tmp_path: Path) -> None:
    odd = tmp_path / "a b%20c#d"
    store = Store(str(odd))
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"
    assert Store(f"file://{tmp_path}").url == Store(str(tmp_path)).url


def test_a_service_without_conditional_writes_is_noticed(
    s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"{s3_url}/unconditional")
    backend = store._backend
    put = backend._put_if
    backend._put_if = lambda path, data, **condition: put(path, data)
    assert store.create("x", b"1")
    assert "ignores conditional writes" in caplog.text
    assert not store.create("x", b"2")
    store.replace("x", b"3", store.version("x"))
    with pytest.raises(StoreConflict):
        store.replace("x", b"4", "stale")
    assert store.read("x") == b"3"


@pytest.mark.parametrize("refuses", [True, False])
def test_a_service_that_creates_if_absent_but_cannot_swap_is_noticed_at_the_start(
    s3_url: str, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    from botocore.exceptions import ClientError

    store = Store(f"{s3_url}/no-swaps-{refuses}")
    backend = store._backend
    put = backend._put_if

    def without_swaps(path: str, data: bytes, **condition: str) -> bool:
        if "IfMatch" in condition and refuses:
            told = {"ResponseMetadata": {"HTTPStatusCode": 501}}
            raise OSError("NotImplemented") from ClientError(told, "PutObject")
        return put(path, data, **({} if "IfMatch" in condition else condition))

    backend._put_if = without_swaps
    store.check_writable()
    assert "honours If-Match" in caplog.text
    assert store.create("x", b"1")
    assert not store.create("x", b"2")
    store.replace("x", b"3", store.version("x"))
    for stale in ("stale", None):
        with pytest.raises(StoreConflict):
            store.replace("x", b"4", stale)
    assert store.read("x") == b"3"


def test_a_conflict_answer_is_asked_again(s3_url: str) -> None:
    from botocore.exceptions import ClientError

    store = Store(f"{s3_url}/busy")
    fs, answers = store._backend.fs, ["409"] * 2
    pipe = fs.pipe_file

    def busy(path: str, data: bytes, **options: str) -> object:
        if answers and path.endswith("x"):
            answers.pop()
            meta = {"HTTPStatusCode": 409}
            cause = ClientError({"Error": {"Code": "409"}, "ResponseMetadata": meta}, "PutObject")
            raise OSError("ConditionalRequestConflict") from cause
        return pipe(path, data, **options)

    fs.pipe_file = busy
    assert store.create("x", b"1")
    assert not answers


def test_killing_a_writer_leaves_only_whole_objects(tmp_path: Path) -> None:
    program = (
        "import sys; from infra.store import Store; s = Store(sys.argv[1])\n"
        "for n in range(10**6): s.create(f'c/{n:07d}', b'x' * 300_000); s.write('w', b'y' * n)"
    )
    root = Path(__file__).parents[2]
    for round_ in range(3):
        folder = tmp_path / str(round_)
        process = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=root)
        deadline = time.monotonic() + 300
        while len(Store(str(folder)).list("c/")) < 3 and time.monotonic() < deadline:
            os.sched_yield()
        process.kill()
        process.wait()
        sizes = Store(str(folder)).sizes()
        assert len(sizes) >= 3
        assert {size for path, size in sizes.items() if path != "w"} == {300_000}
        assert set(Store(str(folder)).read("w")) <= {ord("y")}


def test_a_place_that_can_hold_objects_is_told_from_one_that_cannot(
    tmp_store: Store, tmp_path: Path
) -> None:
    tmp_store.check_writable()
    assert tmp_store.list() == []
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=f"{file} is no folder"):
        Store(f"{file}/below").check_writable()


def test_a_bucket_that_does_not_exist_is_named(s3_url: str) -> None:
    with pytest.raises(FileNotFoundError, match="no bucket of s3://no-such-bucket/x"):
        Store("s3://no-such-bucket/x").check_writable()


def _backend(monkeypatch: pytest.MonkeyPatch, error: Exception) -> S3Backend:
    """Of a service that answers everything with an error."""

    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(backends, "_PAUSES", (0.0,))
    backend = S3Backend("bucket/set", {})
    backend.__dict__["fs"] = SimpleNamespace(info=answer, pipe_file=answer)
    return backend


def test_a_service_that_refuses_is_named_with_what_to_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = _backend(monkeypatch, PermissionError("Forbidden"))
    for call in (lambda: backend.entry("a"), backend.check_writable):
        with pytest.raises(PermissionError, match="s3://bucket/set refuses: Forbidden; check AWS_"):
            call()


def test_an_endpoint_where_nobody_is_shows_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from botocore.exceptions import EndpointConnectionError

    backend = _backend(monkeypatch, EndpointConnectionError(endpoint_url="http://nowhere"))
    with pytest.raises(ConnectionError, match="s3://bucket/set cannot be reached"):
        backend.entry("a")
    (line,) = caplog.records
    assert line.levelname == "WARNING"
    assert "http://nowhere" in line.getMessage()
    assert line.getMessage().endswith("trying again")


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b""])
def test_what_answers_otherwise_than_s3_is_no_empty_dataset(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    class Page(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # or it would not tell who has a body to send to go on

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        store = Store("s3://bucket/set")
        for ask in (lambda: store.list(""), lambda: store.exists("a"), lambda: store.version("a"),
                    lambda: store.create("a", b"1")):  # fmt: skip
            with pytest.raises(ConnectionError, match=r"otherwise than S3 .* AWS_ENDPOINT_URL"):
                ask()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
