"""Checks that a dataset is what its ledger says.

Shallow: three listings and one read for each commit and manifest; finds missing and resized
objects and records that contradict each other. Deep: also reads every object; finds flipped bits,
keys out of order, and statuses that do not match the counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from infra.ledger import OK, commit_path, count_drops, read_keys, read_statuses, streamed
from infra.manifest import Manifest, load_manifest, manifest_names, output_of, versions
from infra.shards import key_digest
from infra.stages import Commit
from infra.store import Store

_READERS = 8

Problem = tuple[str, str]
"""(path inside the store, what is wrong with it)."""


@dataclass
class Report:
    """What `verify` found.

    Args:
        problems: (path, problem), sorted; empty when all is well.
        commits: commits that were checked.
        manifests: manifest versions that were checked.
        bytes: size of the committed objects.
        orphans: objects that no commit refers to, left by interrupted or beaten workers; harmless.
    """

    problems: list[Problem] = field(default_factory=list)
    commits: int = 0
    manifests: int = 0
    bytes: int = 0
    orphans: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


Made = dict[tuple[str, str], dict[int, bytes]]
"""(Stage, output) to shard to a short hash of what its commit says of the output."""


@dataclass
class _Checked:
    """What is kept of one commit."""

    problems: list[Problem]
    paths: list[str] = field(default_factory=list)
    """Objects that it names."""
    made: Made = field(default_factory=dict)


def verify(store: Store, deep: bool = False) -> Report:
    """Checks every commit, every object it names, and every manifest; never raises for damage.

    Commits are read one by one, so that no more than a line of each object is held at a time. What
    is committed meanwhile is not looked at.

    Args:
        deep: also re-read and re-hash all objects.
    """
    report = Report()
    # Commits first: the objects of those that are found were there before them.
    paths = store.list("commits/")
    sizes = store.sizes("shards/") | store.sizes("status/")
    orphans, made = set(sizes), Made()
    for checked in streamed(lambda path: _check(store, path, sizes, deep), paths, _READERS):
        report.problems += checked.problems
        orphans.difference_update(checked.paths)
        for output, shards in checked.made.items():
            made.setdefault(output, {}).update(shards)
    for name in manifest_names(store):
        report.manifests += len(versions(store, name))
        report.problems += _check_manifests(store, name, made)
    report.commits = len(paths)
    report.bytes = sum(size for path, size in sizes.items() if path not in orphans)
    report.orphans = sorted(orphans)
    report.problems.sort()
    return report


def _check(store: Store, path: str, sizes: Mapping[str, int], deep: bool) -> _Checked:
    commit = _read_commit(store, path)
    if isinstance(commit, str):
        return _Checked([(path, commit)])
    problems = list(_check_sizes(commit, sizes))
    if deep:
        problems += _check_content(store, commit, sizes)
    paths = [entry["path"] for entry in (*commit.outputs.values(), commit.status)]
    made = {
        (commit.stage, modality): {commit.shard: _told(output, commit.samples, commit.key_digest)}
        for modality, output in commit.outputs.items()
    }
    return _Checked(problems, paths, made)


def _told(output: Any, samples: Any, key_digest: Any) -> bytes:
    """Equal for what a commit and a manifest say of an output if it is the same."""
    said = json.dumps([output, samples, key_digest], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).digest()


def _read_commit(store: Store, path: str) -> Commit | str:
    """The commit, or what is wrong with it."""
    try:
        commit = Commit.from_dict(store.read_json(path))
        if commit_path(commit.stage, commit.shard) != path:
            return f"is the commit of {commit.stage} shard {commit.shard}"
        if commit.stage.rpartition("@")[2] != commit.fingerprint[:8]:
            return "fingerprint differs from the stage's id"
        for entry in (*commit.outputs.values(), commit.status):
            if entry["sha256"][:12] != entry["path"].rsplit(".", 2)[1] or entry["bytes"] < 0:
                return f"{entry['path']} does not carry its sha256 in its name"
    except FileNotFoundError:
        return "vanished while it was being verified"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return f"not a commit: {error!r}"
    return commit


def _check_sizes(commit: Commit, sizes: Mapping[str, int]) -> Iterator[Problem]:
    for entry in (*commit.outputs.values(), commit.status):
        size = sizes.get(entry["path"])
        if size is None:
            yield entry["path"], f"missing, though {commit.stage} committed it"
        elif size != entry["bytes"]:
            yield entry["path"], f"has {size} bytes, committed were {entry['bytes']}"


def _check_content(store: Store, commit: Commit, sizes: Mapping[str, int]) -> list[Problem]:
    problems: list[Problem] = []
    keys: list[str] = []
    for entry in commit.outputs.values():
        if sizes.get(entry["path"]) != entry["bytes"]:
            continue  # already reported
        data = store.read(entry["path"])
        if (problem := _hash_problem(data, entry)) is not None:
            problems.append((entry["path"], problem))
            continue
        try:
            keys = read_keys(data, entry["path"])
        except ValueError as error:
            problems.append((entry["path"], str(error)))
            continue
        if len(keys) != commit.samples or key_digest(keys) != commit.key_digest:
            counts = f"{len(keys)} samples, committed were {commit.samples}"
            problems.append((entry["path"], f"keys differ from the commit ({counts})"))
    if sizes.get(commit.status["path"]) == commit.status["bytes"] and not problems:
        problems += _check_statuses(store, commit, keys)
    return problems


def _check_statuses(store: Store, commit: Commit, keys: list[str]) -> list[Problem]:
    path = commit.status["path"]
    if (problem := _hash_problem(store.read(path), commit.status)) is not None:
        return [(path, problem)]
    try:
        table = read_statuses(store, commit)
        reasons = dict(zip(*(table[c].to_pylist() for c in ("key", "reason")), strict=True))
    except (pa.ArrowException, KeyError, OSError) as error:
        return [(path, f"not a status table: {error}")]
    if count_drops(reasons.values()) != commit.drops or len(reasons) != table.num_rows:
        return [(path, f"reasons differ from the commit's drops {commit.drops}")]
    expected = {key for key, reason in reasons.items() if reason == OK}
    if not expected <= set(keys) <= reasons.keys():
        return [(path, "samples differ from those of the shard")]
    return []


def _hash_problem(data: bytes, entry: Mapping[str, Any]) -> str | None:
    found = hashlib.sha256(data).hexdigest()
    return None if found == entry["sha256"] else f"sha256 is {found}, not {entry['sha256']}"


def _check_manifests(store: Store, name: str, made: Made) -> Iterator[Problem]:
    available = versions(store, name)
    for version in available:
        path = f"manifests/{name}/v{version:04d}.json"
        try:
            manifest = load_manifest(store, name, version)
            yield from ((path, p) for p in _manifest_problems(manifest, made))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield path, f"not a manifest: {error!r}"
    try:
        current = store.read_json(f"manifests/{name}/CURRENT")["version"]
        if current not in available:
            yield f"manifests/{name}/CURRENT", f"points at version {current}, which is not there"
    except FileNotFoundError:
        yield f"manifests/{name}/CURRENT", "missing; publish again to set it"
    except (ValueError, KeyError, TypeError) as error:
        yield f"manifests/{name}/CURRENT", f"not a version: {error!r}"


def _manifest_problems(manifest: Manifest, made: Made) -> Iterator[str]:
    for shard, entry in manifest.entries.items():
        for modality, about in manifest.modalities.items():
            committed = made.get((about["stage"], output_of(modality)), {}).get(shard)
            output = entry["outputs"].get(modality)
            if committed is None:
                yield f"shard {shard} of {modality} has no valid commit"
            elif committed != _told(output, entry["samples"], entry["key_digest"]):
                yield f"shard {shard} of {modality} differs from its commit"
