"""Contract of verify: silent on a sound dataset, names every damaged object on any other."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import publish
from infra.shards import sample_key, write_tar
from infra.store import Store, json_bytes
from infra.verify import verify

RGB = Stage("fetch", 1, {}, ("rgb",))
COMMIT = f"commits/{RGB.id}/shard-000001.json"


def _filled(store: Store) -> Ledger:
    filled = Ledger(store)
    for shard in range(2):
        keys = [sample_key(shard, row) for row in range(3)]
        tar = write_tar((f"{key}.jpg", b"pixels") for key in keys[:2])
        statuses = [(keys[0], "ok", ""), (keys[1], "ok", ""), (keys[2], "404", "")]
        statuses = statuses[: 2 + shard]  # one shard lost nothing
        filled.commit(RGB, shard, ShardData(keys[:2], {"rgb": tar}, statuses, 1.0))
    publish(filled, "cc", {"rgb": RGB}, [0, 1])
    return filled


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_dataset_has_no_problems(tmp_store: Store, deep: bool) -> None:
    _filled(tmp_store)
    tmp_store.write(f"shards/fetch:rgb@{RGB.fingerprint[:8]}/shard-000000.beaten.tar", b"x")
    report = verify(tmp_store, deep=deep)
    assert report.ok, report.problems
    assert (report.commits, report.manifests, len(report.orphans)) == (2, 1, 1)
    assert report.bytes > 4096


def test_nothing_at_all_is_sound(tmp_store: Store) -> None:
    assert verify(tmp_store, deep=True).ok


def _flip(store: Store, path: str) -> None:
    data = bytearray(store.read(path))
    data[len(data) // 3] ^= 1
    store.write(path, bytes(data))


def _edit(store: Store, path: str, **changes: object) -> None:
    store.write(path, json_bytes(store.read_json(path) | changes))


def _forge(store: Store, sha256: str = "") -> None:
    """The commit's tar is no tar; its digest is that of its content, or another one."""
    data = b"no tar" * 1000
    digest = hashlib.sha256(data).hexdigest()
    path = f"shards/{RGB.id}/shard-000001.{digest[:12]}.tar"
    store.write(path, data)
    entry = {"path": path, "sha256": sha256 or digest, "bytes": len(data)}
    _edit(store, COMMIT, outputs={"rgb": entry})


DAMAGE: dict[str, tuple[Callable[[Store, str, str], object], bool, str]] = {
    "lost tar": (lambda s, tar, _: s.delete(tar), False, "missing"),
    "cut tar": (lambda s, tar, _: s.write(tar, s.read(tar)[:-512]), False, "bytes, committed"),
    "flipped tar": (lambda s, tar, _: _flip(s, tar), True, "sha256 is"),
    "lost status": (lambda s, _, status: s.delete(status), False, "missing"),
    "flipped status": (lambda s, _, status: _flip(s, status), True, "sha256 is"),
    "other digest": (lambda s, *_: _edit(s, COMMIT, key_digest="0"), True, "keys differ"),
    "other count": (lambda s, *_: _edit(s, COMMIT, samples=7), True, "committed were 7"),
    "other drops": (lambda s, *_: _edit(s, COMMIT, drops={}), True, "reasons differ"),
    "broken commit": (lambda s, *_: s.write(COMMIT, b"{"), False, "not a commit"),
    "hostile commit": (lambda s, *_: s.write(COMMIT, b"[1]"), False, "not a commit"),
    "no tar": (lambda s, *_: _forge(s), True, "header"),
    "no digest in the name": (lambda s, *_: _forge(s, "0" * 64), False, "does not carry its sha"),
    "other stage": (lambda s, *_: _edit(s, COMMIT, fingerprint="0" * 64), False, "fingerprint"),
    "moved commit": (lambda s, *_: _edit(s, COMMIT, shard=5), False, "is the commit of"),
    "uncommitted": (lambda s, *_: s.delete(COMMIT), False, "shard 1 of rgb has no valid commit"),
    "edited manifest": (
        lambda s, *_: _edit(s, "manifests/cc/v0001.json", entries={"1": {}}),
        False,
        "not a manifest",
    ),
    "no current": (lambda s, *_: s.delete("manifests/cc/CURRENT"), False, "publish again"),
    "wrong current": (
        lambda s, *_: s.write("manifests/cc/CURRENT", b'{"version": 9}'), False, "version 9"
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_every_damage_is_found(tmp_path: Path, case: str) -> None:
    ledger = _filled(Store(str(tmp_path)))
    damage, deep, message = DAMAGE[case]
    commit = ledger.read_commit(RGB, 1)
    damage(ledger.store, commit.outputs["rgb"]["path"], commit.status["path"])
    report = verify(ledger.store, deep=deep)
    assert any(message in problem for _, problem in report.problems), report.problems


def test_what_is_committed_meanwhile_is_no_problem(tmp_path: Path) -> None:
    class Busy(Store):
        """Another run commits a shard between any two listings."""

        def sizes(self, prefix: str = "") -> dict[str, int]:
            found = super().sizes(prefix)
            shard = len(Ledger(quiet).committed(RGB))
            key = sample_key(shard, 0)
            tar = write_tar([(f"{key}.jpg", b"pixels")])
            data = ShardData([key], {"rgb": tar}, [(key, "ok", "")], 1.0)
            Ledger(quiet).commit(RGB, shard, data)
            return found

    quiet = Store(str(tmp_path))
    _filled(quiet)
    report = verify(Busy(str(tmp_path)), deep=True)
    assert report.ok, report.problems
    assert report.commits >= 2
