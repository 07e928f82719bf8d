from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.stages import Commit
from infra.store import Store
from infra.strict import MAX_UNPACKED, read_json, read_npy, read_npz
from tasks.train_tokenizers import TokenizerInfo, read_info


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def headed(header: str, payload: bytes = b"") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


@pytest.mark.parametrize("array", [
    np.zeros((2, 3), np.float16), np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array(3, ">i4"), np.zeros((0, 3)), np.array(["a", "bc"]),
])
def test_arrays_come_back_and_may_be_written_to(array):
    found = read_npy(npy(array))
    assert found.dtype == array.dtype
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("shape", [
    "(1000000000000,)", "(4294967296, 4294967296)", "(-1,)", "(-1, -2)", "(0, 10 ** 30)",
    "(True,)", "(2.0,)", "(" * 200, "9" * 4000, "(99999999999999999999, 0)", "None", "{'a':{",
    "\0", "()" * 3000,
])
def test_a_header_that_promises_what_is_not_there_takes_no_memory_and_is_refused(shape):
    data = headed(f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}", bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x is not a plain \.npy"):
            read_npy(data, "x")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=64), st.integers(0, 140))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_the_readers_of_arrays_fail_otherwise(data, at):
    whole = npy(np.arange(6, dtype=np.float16).reshape(2, 3))
    for each in (data, whole[:at] + data, whole[:at] + data + whole[at + len(data):]):
        try:
            read_npy(each)
        except ValueError:
            pass
    buffer = io.BytesIO()
    np.savez(buffer, emb=np.zeros((2, 2)))
    packed = buffer.getvalue()
    try:
        read_npz(packed[:at] + data + packed[at + len(data):], ("emb",))
    except ValueError:
        pass


def test_an_array_that_unpacks_without_end_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("emb.npy", "w") as member:
            for _ in range((MAX_UNPACKED >> 20) + 1):
                member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="emb is longer than"):
        read_npz(buffer.getvalue(), ("emb",))


def test_json_that_is_nested_without_end_is_refused():
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(b"[" * 100_000)
    assert read_json(b"[1]") == [1]


def test_a_record_of_newer_software_is_refused_by_its_place_and_what_is_unknown(tmp_path):
    store = Store(str(tmp_path))
    info = vars(TokenizerInfo("rgb", "tokenizers/rgb@1", "f", 8, 4, {"psnr": float("nan")}, 1.0))
    store.write_json("tokenizers/rgb@1/info.json", info)
    assert read_info(store, "tokenizers/rgb@1").num_tokens == 4
    store.write_json("tokenizers/rgb@1/info.json", {**info, "depth": 3})
    with pytest.raises(ValueError, match=r"rgb@1/info.json: unknown 'depth'; if a newer version"):
        read_info(store, "tokenizers/rgb@1")
    with pytest.raises(ValueError, match=r"not a commit: unknown 'mood'; if a newer version"):
        Commit.from_dict({"mood": 1})
