"""Machine facts are there and of the right kind."""

import json
import os
import re

from infra import machine


def test_describe_is_json_and_names_the_essentials():
    facts = json.loads(json.dumps(machine.describe()))
    assert {"cpu", "cores", "memory", "os", "python", "commit", "torch", "ray"} <= facts.keys()
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory"] > 2**28


def test_fast_bf16_is_decided_once():
    assert machine.fast_bf16() in (True, False)
    assert machine.fast_bf16() is machine.fast_bf16()


def test_peak_memory_is_in_bytes():
    assert 2**23 < machine.peak_rss() < 2**40


def test_commit_hash_names_the_code():
    assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?|v.+", machine.commit_hash())
