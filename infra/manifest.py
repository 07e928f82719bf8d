"""Immutable, versioned lists of commits: what training reads.

Publishing proves that every shard holds the same keys in the same order in all modalities, by the
key digests of the commits; a missing label is a hole inside its shard and therefore no gap here.
Adding a modality is a new manifest over the same objects; nothing is copied.

    manifests/<name>/v0001.json     created once, never changed but by `tasks.withdraw`
    manifests/<name>/CURRENT        the version to use, moved with compare-and-swap

A modality may be there at several sizes: "tok_rgb" and, of another stage, "tok_rgb@448".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra.ledger import Ledger, first_difference, read_keys
from infra.stages import Commit, Stage
from infra.store import Store, StoreConflict, json_bytes
from infra.strict import typed

_T = TypeVar("_T")

_OUTPUT = ("path", "sha256", "bytes")
"""What a manifest keeps of an output."""


class ManifestError(ValueError):
    """The shards cannot be published, or a manifest does not hold together."""


@dataclass(frozen=True)
class Manifest:
    """One version of a dataset.

    Args:
        name: the dataset's name.
        version: counts from 1.
        modalities: modality -> {stage, fingerprint, model, revision}; what follows an "@" in its
            name tells it from another stage's output of the same name.
        entries: shard -> {samples, key_digest, outputs: {modality: {path, sha256, bytes}}}.
        splits: split -> its shards, sorted; every shard is in at most one.
        tokenizers: name -> whatever identifies it.
        meta: anything training needs to know: crops, specification, ...
    """

    name: str
    version: int
    modalities: dict[str, dict[str, Any]]
    entries: dict[int, dict[str, Any]]
    splits: dict[str, list[int]]
    tokenizers: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def shards(self, split: str | None = None) -> list[int]:
        """Sorted shards of a split, all of them for None. Raises ValueError for another split."""
        if split is None:
            return sorted(self.entries)
        if split not in self.splits:
            raise ValueError(f"{self.name} has splits {sorted(self.splits)}, not {split!r}")
        return list(self.splits[split])

    def samples(self, shard: int) -> int:
        """Samples of a shard, holes included."""
        return self._told(shard, "samples", int)

    def path(self, modality: str, shard: int) -> str:
        """Path of a tar inside the store."""
        return self._output(modality, shard, "path")

    def sha256(self, modality: str, shard: int) -> str:
        """Hex digest of a tar."""
        return self._output(modality, shard, "sha256")

    def key_digest(self, shard: int) -> str:
        """Digest of a shard's ordered keys, see `infra.shards.key_digest`."""
        return self._told(shard, "key_digest", str)

    def to_dict(self) -> dict[str, Any]:
        """JSON value that `from_dict` turns into an equal manifest."""
        entries = {str(shard): entry for shard, entry in self.entries.items()}
        return {**vars(self), "entries": entries}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Manifest:
        """The manifest of a JSON value. Raises ManifestError when it is none."""
        try:
            entries = {int(shard): entry for shard, entry in value["entries"].items()}
            return typed(cls, {**value, "entries": entries}, "fields")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ManifestError(f"not a manifest: {error!r}") from error

    def _entry(self, shard: int) -> dict[str, Any]:
        if shard not in self.entries:
            raise ValueError(f"{self.name} v{self.version} has no shard {shard}")
        return self.entries[shard]

    def _told(self, shard: int, name: str, kind: type[_T]) -> _T:
        value = self._entry(shard).get(name)
        if not isinstance(value, kind):
            raise ManifestError(f"{self.name} v{self.version}: shard {shard} tells no {name}")
        return value

    def _output(self, modality: str, shard: int, name: str) -> str:
        if modality not in self.modalities:
            raise ValueError(f"{self.name} has {sorted(self.modalities)}, not {modality!r}")
        output = self._told(shard, "outputs", dict).get(modality)
        value = output.get(name) if isinstance(output, dict) else None
        if not isinstance(value, str):
            raise ManifestError(f"{self.name} v{self.version}: shard {shard} tells no {name} of "
                                f"{modality}")  # fmt: skip
        return value


def publish(
    ledger: Ledger,
    name: str,
    stages: Mapping[str, Stage],
    shards: Iterable[int],
    *,
    splits: Mapping[str, Sequence[int]] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes the next version of a manifest and makes it the current one.

    Args:
        stages: modality -> the stage that wrote it.
        splits: split -> shards; everything is "train" when not given.

    Returns:
        The manifest. When the latest version has exactly this content, that version.

    Raises:
        ManifestError: a shard lacks a modality, or two modalities hold other keys; the sentence
            names the shard, the modalities and the first key that differs.
        ValueError: the splits overlap, or name shards that are not published.
    """
    shards = sorted(set(shards))
    if not name or "/" in name or not stages or not shards:
        raise ValueError("a manifest needs a name without '/', a modality and at least one shard")
    cut = {"train": shards} if splits is None else splits
    content = {
        "name": name,
        "modalities": {
            modality: {
                "stage": stage.id,
                "fingerprint": stage.fingerprint,
                "model": stage.model,
                "revision": stage.revision,
            }
            for modality, stage in sorted(stages.items())
        },
        "entries": _entries(ledger, stages, shards),
        "splits": _checked_splits(cut, shards),
        # As JSON gives it back, so that tuples do not make equal content look new.
        "tokenizers": json.loads(json_bytes(dict(tokenizers or {}))),
        "meta": json.loads(json_bytes(dict(meta or {}))),
    }
    manifest = _write_version(ledger.store, name, content)
    _move_current(ledger.store, name, manifest.version)
    return manifest


def load_manifest(store: Store, name: str, version: int | None = None) -> Manifest:
    """A version of a manifest, the current one for None.

    Raises:
        FileNotFoundError: there is none; names the URL.
        ManifestError: the object is not the manifest it should be.
    """
    if version is None:
        try:
            version = _current(store, name)
        except FileNotFoundError as error:
            names = ", ".join(manifest_names(store))
            there = f"there is {names}" if names else "`fourm publish` makes one"
            where = store.full(_current_path(name))
            raise FileNotFoundError(f"no manifest {name!r} at {where}; {there}") from error
    manifest = Manifest.from_dict(store.read_json(_version_path(name, version)))
    if (manifest.name, manifest.version) != (name, version):
        where = store.full(_version_path(name, version))
        raise ManifestError(f"{where} is {manifest.name} v{manifest.version}")
    return manifest


def _current(store: Store, name: str) -> int:
    """The version that CURRENT points at. Raises ManifestError where it is none."""
    value = store.read_json(_current_path(name))
    if not isinstance(value, dict) or type(value.get("version")) is not int:
        raise ManifestError(f"{store.full(_current_path(name))} holds no version")
    return int(value["version"])


def amend(store: Store, manifest: Manifest) -> None:
    """Put a version in the place of what stands under its number: only where samples must go."""
    store.write_json(_version_path(manifest.name, manifest.version), manifest.to_dict())


def output_of(modality: str) -> str:
    """What the stage behind a manifest's modality calls it: "tok_rgb" of "tok_rgb@448"."""
    return modality.partition("@")[0]


def manifest_names(store: Store) -> list[str]:
    """Names of all published manifests."""
    return sorted({path.split("/")[1] for path in store.list("manifests/")})


def versions(store: Store, name: str) -> list[int]:
    """All versions of a manifest, ascending."""
    found = (re.search(r"/v(\d+)\.json$", path) for path in store.list(f"manifests/{name}/v"))
    return sorted(int(match[1]) for match in found if match)


def _entries(
    ledger: Ledger, stages: Mapping[str, Stage], shards: Sequence[int]
) -> dict[str, dict[str, Any]]:
    # Stage by stage and commit by commit: many commits take more memory than what is kept of them.
    entries: dict[str, dict[str, Any]] = {str(shard): {"outputs": {}} for shard in shards}
    written: dict[Stage, list[str]] = {}
    for modality, stage in sorted(stages.items()):
        stage.directory(output_of(modality))  # refuses what the stage does not write
        written.setdefault(stage, []).append(modality)
    for stage, modalities in written.items():
        left = set(shards)
        for commit in ledger.each_commit(stage):
            if commit.shard in left:
                left.remove(commit.shard)
                _enter(ledger.store, entries[str(commit.shard)], commit, modalities)
        if left:
            raise ManifestError(
                f"shard {min(left)} lacks {modalities[0]}: {stage.id} has not committed it; "
                "finish the stage, or publish without this shard"
            )
    return entries


def _enter(store: Store, entry: dict[str, Any], commit: Commit, modalities: list[str]) -> None:
    """Take up what a commit says of its shard, after a check that its keys are those of others."""
    made = {
        modality: {name: commit.outputs[output_of(modality)][name] for name in _OUTPUT}
        for modality in modalities
    }
    if entry.setdefault("key_digest", commit.key_digest) != commit.key_digest:
        sides = [next(iter(outputs.items())) for outputs in (entry["outputs"], made)]
        (left, a), (right, b) = ((name, output["path"]) for name, output in sides)
        keys = [read_keys(store.read(path), path) for path in (a, b)]
        raise ManifestError(
            f"shard {commit.shard}: {left} ({a}) and {right} ({b}) hold other keys: "
            f"{first_difference(*keys)} ({left} here, {right} there)"
        )
    entry["samples"] = commit.samples
    entry["outputs"].update(made)


def _checked_splits(
    splits: Mapping[str, Sequence[int]], shards: Sequence[int]
) -> dict[str, list[int]]:
    owner: dict[int, str] = {}
    published = set(shards)
    for split, members in splits.items():
        for shard in members:
            if shard not in published:
                raise ValueError(f"split {split!r} names shard {shard}, which is not published")
            if shard in owner:
                raise ValueError(f"shard {shard} is in both {owner[shard]!r} and {split!r}")
            owner[shard] = split
    return {split: sorted(members) for split, members in splits.items()}


def _write_version(store: Store, name: str, content: dict[str, Any]) -> Manifest:
    """The latest version where it has this content, else the next one."""
    version = max(versions(store, name), default=0)
    while not (version and _is_version(store, name, version, content)):
        # A number that is taken, though the listing did not tell of it, is looked at next.
        version += 1
        if store.create_json(_version_path(name, version), content | {"version": version}):
            break
    return Manifest.from_dict(content | {"version": version})


def _is_version(store: Store, name: str, version: int, content: dict[str, Any]) -> bool:
    # By their bytes: two manifests of a large set take much memory as objects.
    return store.read(_version_path(name, version)) == json_bytes(content | {"version": version})


def _move_current(store: Store, name: str, version: int) -> None:
    """Points CURRENT at the version unless it already points there or further."""
    while True:
        expected = store.version(_current_path(name))
        if expected is not None and _current(store, name) >= version:
            return
        try:
            return store.replace(_current_path(name), b'{"version": %d}\n' % version, expected)
        except StoreConflict:
            continue


def _version_path(name: str, version: int) -> str:
    return f"manifests/{name}/v{version:04d}.json"


def _current_path(name: str) -> str:
    return f"manifests/{name}/CURRENT"
