"""Machine facts are there and of the right kind."""

import json
import os
import platform
import re
import subprocess
import sys
import types

import pytest
import torch

from infra import machine


def test_describe_is_json_and_names_the_essentials():
    facts = json.loads(json.dumps(machine.describe()))
    assert {"cpu", "cores", "memory", "os", "python", "commit", "torch", "ray"} <= facts.keys()
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory"] > 2**28


def test_fast_bf16_is_decided_once():
    assert machine.fast_bf16() in (True, False)
    assert machine.fast_bf16() is machine.fast_bf16()


def test_a_busy_moment_does_not_decide_about_bf16_where_the_cpu_has_units_for_it(monkeypatch):
    busy = {"bf16": 1.0, "fp32": 1.0}
    monkeypatch.setattr(machine, "_matmul_seconds", busy.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for units, fast in ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), (
        {"amx_bf16": False, "avx512_bf16": False}, False), ({}, False):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=units: told, raising=False)
        assert machine.fast_bf16.__wrapped__() is fast


def test_a_gpu_that_is_fast_at_bf16_says_nothing_of_the_cpu_beside_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(machine, "_matmul_seconds", {"bf16": 1.0, "fp32": 1.0}.get)
    assert machine.fast_bf16.__wrapped__("cuda") is True
    assert machine.fast_bf16.__wrapped__("cpu") is False


def test_products_round_only_where_asked_and_what_was_set_comes_back():
    set_to = torch.get_float32_matmul_precision
    before = set_to()
    with machine.fp32_products("cpu", rounded=True):
        assert set_to() == "medium"
        with machine.fp32_products("cpu", rounded=False):
            assert set_to() == "highest"
        assert set_to() == "medium"
    assert set_to() == before
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    with machine.fp32_products("cuda", rounded=True):
        assert set_to() == "high"
        assert torch.backends.cudnn.allow_tf32
    with machine.fp32_products("cuda", rounded=False):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), machine.fp32_products("cpu", rounded=True):
        raise KeyError
    assert set_to() == before



def test_the_rate_of_products_does_not_depend_on_what_torch_is_set_to():
    with machine.fp32_products("cpu", rounded=True):
        machine._matmul_seconds("fp32", size=8)
        assert torch.get_float32_matmul_precision() == "medium"


def test_peak_memory_is_in_bytes():
    assert 2**23 < machine.peak_rss() < 2**40


def test_commit_hash_names_the_code():
    assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?|v.+", machine.commit_hash())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's malloc")
def test_large_blocks_that_a_thread_frees_are_kept_where_threads_share_one_pool():
    """In a process of its own, for what malloc is told holds until the end."""
    code = """
import resource, threading
from infra.machine import keep_freed_memory
keep_freed_memory(one_pool=True)
faults = []
def work():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(24 << 20) for _ in range(4)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(sum(faults[3:]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20, "3 x 96 MB were asked of the kernel again"


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_lets_it_be():
    code = """
import resource
from infra.machine import FILES, most_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
assert most_files() == most == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))
assert most_files() == 300
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_with_a_gpu_that_torch_cannot_use_is_an_error_and_other_processes_take_the_cpu(
    monkeypatch,
):
    given: list[int] = []
    ray = types.SimpleNamespace(is_initialized=lambda: True, get_gpu_ids=lambda: given)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.chosen_device() == "cpu"
    given.append(3)
    with pytest.raises(RuntimeError, match=r"occupies GPU 3, which torch \S+ cannot use"):
        machine.chosen_device()
    monkeypatch.delitem(sys.modules, "ray")
    assert machine.chosen_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.chosen_device() == "cuda"


def test_compiling_for_gpus_without_a_c_compiler_is_refused_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="neither gcc nor clang"):
        machine.check_compiler("cuda")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    machine.check_compiler("cuda")


def test_without_the_driver_of_a_gpu_none_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert machine.gpus() == 2
    monkeypatch.setattr(machine.os.path, "exists", lambda path: False)
    assert machine.gpus() == 0
