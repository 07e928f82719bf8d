"""The scenes' server: delivers what its list says, and fails in the ways it promises."""

import http.client
import io
import json
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from infra.scenes import render, sample_scene, scene_caption
from infra.scenes.rows import DELIVERING, FAULTS, path_of, read_path, scene_rows, write_tsv
from infra.scenes.server import ENDLESS_BYTES, SceneServer
from tests.infra.serving import free_port


@pytest.fixture(scope="module")
def server():
    with SceneServer(100, 8, size=64, workers=1) as running:
        yield running


def _get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def _pixels(body):
    return np.asarray(Image.open(io.BytesIO(body)))


def test_an_image_is_its_scene(server):
    status, headers, body = _get(server, path_of("img", 101))
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    truth = render(sample_scene(101), 64).rgb
    assert np.abs(_pixels(body).astype(int) - truth).mean() < 3


def test_scenes_outside_of_the_range_are_not_found(server):
    assert _get(server, path_of("img", 99))[0] == 404
    assert _get(server, path_of("img", 108))[0] == 404
    for path in ("/", "/img/x.jpg", "/img/../img/101.jpg", "/img/-1.jpg", "/img/101.png"):
        assert _get(server, path)[0] == 404


def test_dead_and_gone_links(server):
    assert _get(server, path_of("dead", 101))[0] == 404
    assert _get(server, path_of("gone", 101))[0] == 410


def test_a_flaky_link_recovers_when_tried_again(server):
    assert _get(server, path_of("flaky", 102))[0] == 500
    status, _, body = _get(server, path_of("flaky", 102))
    assert status == 200
    assert _pixels(body).shape == (64, 64, 3)


def test_a_slow_link_delivers(server):
    assert _get(server, path_of("slow", 102))[0] == 200


def test_a_page_under_a_pictures_name(server):
    status, headers, body = _get(server, path_of("html", 101))
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert body.startswith(b"<!doctype html>")


def test_a_truncated_picture_does_not_decode(server):
    _, _, body = _get(server, path_of("truncated", 101))
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(body)).load()


def test_a_huge_picture_is_small_on_the_wire(server):
    _, _, body = _get(server, path_of("huge", 101))
    assert len(body) < 10_000
    assert struct.unpack(">II", body[16:24]) == (60_000, 60_000)


def test_an_endless_picture_names_no_length_and_exceeds_any_limit(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    connection.request("GET", path_of("endless", 101))
    answer = connection.getresponse()
    assert answer.getheader("Content-Length") is None
    assert len(answer.read(1 << 20)) == 1 << 20
    connection.close()
    assert ENDLESS_BYTES >= 64 << 20


def test_a_redirect_leads_into_a_private_network(server):
    status, headers, _ = _get(server, path_of("private", 101))
    assert status == 302
    assert headers["Location"].startswith("http://10.")


def test_links_outlive_a_restart_on_a_fixed_port():
    port, bodies = free_port(), []
    for _ in range(2):
        with SceneServer(0, 1, size=32, port=port, workers=1) as server:
            assert server.url == f"http://127.0.0.1:{port}"
            bodies.append(_get(server, path_of("img", 0))[2])
    assert bodies[0] == bodies[1]


def test_a_taken_port_is_named(server):
    with (
        pytest.raises(ValueError, match=str(server.port)),
        SceneServer(0, 1, port=server.port),
    ):
        pass


def test_rows_are_functions_of_their_seeds():
    rows = list(scene_rows(0, 60, fault_rate=0.3, duplicate_rate=0.1))
    assert rows == list(scene_rows(0, 60, fault_rate=0.3, duplicate_rate=0.1))
    fresh = [row for row in rows if row.kind != "duplicate"]
    later = list(scene_rows(30, 30, fault_rate=0.3, duplicate_rate=0))
    assert fresh[30:] == later


def test_rows_tell_what_is_delivered():
    rows = list(scene_rows(0, 150, fault_rate=0.5, duplicate_rate=0.1))
    kinds = Counter(row.kind for row in rows)
    assert kinds["duplicate"] > 0
    assert 0.3 < sum(kinds[fault] for fault in FAULTS) / 150 < 0.7
    seen = {}
    for row in rows:
        kind, seed = read_path(row.path)
        assert row.seed == (seed if kind in DELIVERING else None)
        if row.kind == "duplicate":
            assert seen[row.path] == row.caption
        seen[row.path] = row.caption
    assert rows[0].caption == scene_caption(sample_scene(0))


def test_no_fault_without_a_rate_and_no_rate_beyond_one():
    assert {row.kind for row in scene_rows(0, 20, 0, 0)} == {"img"}
    with pytest.raises(ValueError, match="fault_rate"):
        next(scene_rows(0, 1, fault_rate=3))


def test_the_list_is_a_headless_tsv_of_links_and_captions(tmp_path):
    path = tmp_path / "list.tsv"
    lines = write_tsv(path, "http://127.0.0.1:81/", 0, 20, 0.3, 0.2)
    read = [line.split("\t") for line in path.read_text().splitlines()]
    rows = list(scene_rows(0, 20, 0.3, 0.2))
    assert lines == len(read) == len(rows)
    assert read == [[f"http://127.0.0.1:81{row.path}", row.caption] for row in rows]


def test_importing_the_scenes_loads_no_heavy_library():
    code = (
        "import sys, json, infra.scenes.server; "
        "print(json.dumps([m for m in ('torch', 'ray', 'prefect', 'scipy', 'aiohttp')"
        " if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(out.stdout) == []
