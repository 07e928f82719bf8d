"""Export of a published set in a layout of others, and import of such sets, to the same bytes.

Beside the shards an export holds `fourm.json`: the parts, the crops, the tokenizers, the splits
and the sha256 of every tar of the original. An import rebuilds those tars and compares them, so
that a round trip is exact or an error. A set of the released code, which has no such file, is
imported from its folders alone.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.blocks import BlockReader
from infra.ledger import OK, Ledger, ShardData, Stage
from infra.manifest import Manifest, load_manifest, output_of, publish
from infra.runner import StageJob
from infra.shards import TornShard, key_digest
from infra.store import Store, json_bytes
from models import modalities
from models.crops import CropPolicy
from tasks import chain
from tasks.foreign import checked, infer
from tasks.layouts import (
    LAYOUTS,
    LayoutName,
    Part,
    Shard,
    load_files,
    load_tokens,
    read_shard,
    to_tar,
    token_part,
    write_shard,
)

log = logging.getLogger("fourm.interchange")

ABOUT = "fourm.json"
VERSION = 1
_DONE = "fourm/"
_CLAIM = f"{_DONE}export.json"
_LABELS = "import:labels"
SECTION = "import"
"""Section of `dataset.json` that says where imported labels lie."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    shards: int
    samples: int
    left_out: int
    """Samples with a hole, which the layout has no place for."""
    parts: list[str]


@dataclass(frozen=True)
class _Place:
    """Where a part lies in the dataset."""

    part: str
    modality: str
    stage: str


def export_set(
    store: Store,
    out: Store,
    *,
    layout: LayoutName,
    manifest: str = "main",
    parts: Sequence[str] = (),
) -> Exported:
    """Write a published set and the labels behind it in a layout.

    An interrupted export goes on where it was. ml-4m knows no holes: samples that lack a part
    are left out there, counted, and listed in the export.

    Args:
        out: where to; a folder or a prefix of its own.
        manifest: name of the published set.
        parts: what to write, such as rgb, depth, tok_depth; nothing: everything that all of its
            shards have.

    Raises:
        FileNotFoundError: nothing is published under that name.
        ValueError: a part does not exist or lacks shards, or another set was exported there.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    source = load_manifest(store, manifest)
    places = _chosen(Ledger(store), _places(store, source), source.shards(), parts)
    about = _about(store, source, layout, places)
    _claim(out, about["id"])
    entries = [
        _export_shard(store, out, about, places, number, shard)
        for number, shard in enumerate(source.shards())
    ]
    for path in _tokenizer_files(store, source):
        out.write(path, store.read(path))
    out.write_json(ABOUT, about | {"shards": entries})
    samples = sum(entry["samples"] for entry in entries)
    left_out = sum(len(entry["left_out"]) for entry in entries)
    return Exported(len(entries), samples, left_out, [place.part for place in places])


def _claim(out: Store, export: str) -> None:
    # From its beginning on: shards of one that was broken off fit no other.
    if not out.exists(ABOUT):
        out.create_json(_CLAIM, {"id": export})
    if any(out.read_json(path)["id"] != export for path in (ABOUT, _CLAIM) if out.exists(path)):
        raise ValueError(f"{out.url} holds another export; choose another place")


def _places(store: Store, manifest: Manifest) -> list[_Place]:
    """Everything that belongs to a set: its pictures, its tokens, and the labels behind them."""
    settings = chain.Chain(store).settings
    labels: dict[str, str] = dict(settings.get(SECTION, {}))
    if "label" in settings:
        labels |= {name: stage.id for name, stage in chain.Chain(store).sources.items()}
    found = {name: _Place(name, name, stage) for name, stage in labels.items()}
    for name, entry in manifest.modalities.items():
        part = f"ids_{name}" if _is_sequence(name) else name
        found[part] = _Place(part, name, entry["stage"])
    return [found[name] for name in sorted(found)]


def _is_sequence(modality: str) -> bool:
    """Whether a manifest's modality of this name holds the tokens of a text of that name."""
    return modalities.text_form(modality) is not None


def _chosen(
    ledger: Ledger, places: list[_Place], shards: Sequence[int], parts: Sequence[str]
) -> list[_Place]:
    """Of the places those of parts that are named, or else of all parts that are there whole."""
    names = [place.part for place in places]
    if unknown := [name for name in parts if name not in names]:
        raise ValueError(f"no part {unknown[0]!r}; there are {', '.join(names)}")
    committed = {stage: ledger.committed(stage) for stage in {place.stage for place in places}}
    chosen = []
    for place in places:
        if parts and place.part not in parts:
            continue
        lacks = sorted(set(shards) - committed[place.stage])
        if lacks and parts:
            raise ValueError(f"{place.part} lacks shard {lacks[0]}: {place.stage} has not made it")
        if lacks:
            log.warning("%s is left out: it lacks %d shards", place.part, len(lacks))
        else:
            chosen.append(place)
    return chosen


def _about(
    store: Store, manifest: Manifest, layout: LayoutName, places: list[_Place]
) -> dict[str, Any]:
    """What an import needs to know, but the shards."""
    shards = manifest.shards()
    first, position = shards[0], {shard: number for number, shard in enumerate(shards)}
    described = []
    for place in places:
        tar, source = _read(store, place, first)
        if place.part == place.modality and not place.part.startswith("tok_"):
            described.append(Part(place.part, place.modality))
        else:
            reader = BlockReader.from_bytes(tar, source)
            described.append(token_part(place.part, place.modality, reader))
    about = {
        "version": VERSION,
        "layout": layout,
        "name": manifest.name,
        "parts": [part.to_dict() for part in described],
        "crops": manifest.meta.get("crops"),
        "tokenizers": manifest.tokenizers,
        "modalities": sorted(manifest.modalities),
        "splits": {
            split: [position[shard] for shard in members]
            for split, members in manifest.splits.items()
        },
    }
    identity = [about, manifest.version, [asdict(place) for place in places]]
    return about | {"id": hashlib.sha256(json_bytes(identity)).hexdigest()}


def _read(store: Store, place: _Place, shard: int) -> tuple[bytes, str]:
    output = Ledger(store).read_commit(place.stage, shard).outputs[output_of(place.modality)]
    data = store.read(output["path"])
    if hashlib.sha256(data).hexdigest() != output["sha256"]:
        raise TornShard(f"{store.full(output['path'])} is not what was committed")
    return data, store.full(output["path"])


def _export_shard(
    store: Store, out: Store, about: dict[str, Any], places: list[_Place], number: int, shard: int
) -> dict[str, Any]:
    done = f"{_DONE}{about['id'][:12]}/{number:05d}.json"
    if out.exists(done):
        return dict(out.read_json(done))
    content, parts = Shard([]), [Part.from_dict(part) for part in about["parts"]]
    for place, part in zip(places, parts, strict=True):
        tar, source = _read(store, place, shard)
        if part.is_tokens:
            keys, content.tokens[part.name] = load_tokens(BlockReader.from_bytes(tar, source))
        else:
            keys, content.files[part.name] = load_files(tar, source)
        if keys != (content.keys or keys):
            raise ValueError(f"{source} holds other keys than {places[0].part}")
        content.keys = keys
    holes = content.holes() if about["layout"] == "ml-4m" else set()
    left_out = [content.keys[row] for row in sorted(holes)]
    content = content.without(holes) if holes else content
    crops = CropPolicy(**about["crops"]) if about["crops"] else None
    write_shard(about["layout"], out, number, parts, content, crops)
    entry = {
        "shard": shard,
        "samples": len(content.keys),
        "key_digest": key_digest(content.keys),
        "left_out": left_out,
        "sha256": {
            part.name: hashlib.sha256(to_tar(part, content)).hexdigest() for part in parts
        },
    }
    out.write_json(done, entry)
    return entry


def _tokenizer_files(store: Store, manifest: Manifest) -> Iterable[str]:
    folders = {entry["path"] for entry in manifest.tokenizers.values() if entry.get("path")}
    return [path for folder in sorted(folders) for path in store.list(f"{folder}/")]


# --- import -----------------------------------------------------------------------------------


def read_about(source: Store) -> dict[str, Any]:
    """What is known of an exported set, or of one of the released code.

    Raises:
        ValueError: the place holds no set that can be imported; says what there is instead.
    """
    if source.exists(ABOUT):
        about = source.read_json(ABOUT)
        if not isinstance(about, dict) or about.get("version") != VERSION:
            raise ValueError(f"{source.full(ABOUT)} is not of version {VERSION}")
        return checked(about, source.full(ABOUT))
    return infer(source)


def import_jobs(store: Store, source: Store) -> list[StageJob]:
    """Plan the import of a set into a new dataset; the stage runner does it.

    Returns:
        A job for the files and one for the tokens, as far as there are any.

    Raises:
        ValueError: there is nothing to import, or the dataset holds something else.
    """
    about = read_about(source)
    shards = tuple(range(len(about["shards"])))
    numbers = [entry["shard"] for entry in about["shards"]]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{source.full(ABOUT)} names a shard twice")
    plan = {
        "id": about["id"],
        "source": source.url,
        "shard_rows": max((entry["samples"] for entry in about["shards"]), default=0),
        "num_shards": max(numbers, default=-1) + 1,
        "format": about["layout"],
    }
    Ledger(store).write_plan(plan)
    jobs = []
    for stage in _stages(about):
        config = {"source": source.url, "places": dict(zip(map(str, numbers), shards, strict=True))}
        jobs.append(StageJob(stage, "tasks.interchange:build_work", config, tuple(numbers)))
    return jobs


def _stages(about: dict[str, Any]) -> list[Stage]:
    outputs: dict[str, list[str]] = {}
    for part in map(Part.from_dict, about["parts"]):
        outputs.setdefault(_stage_of(part), []).append(output_of(part.modality))
    return [Stage(name, 1, {"set": about["id"]}, tuple(outputs[name])) for name in sorted(outputs)]


def _stage_of(part: Part) -> str:
    """Name of the stage that imports a part: one for files, and one for the tokens of each size."""
    size = part.modality.removeprefix(output_of(part.modality)).replace("@", ":")
    return ("import:tokens" if part.is_tokens else _LABELS) + size


def build_work(store_url: str, stage: Stage, config: dict[str, Any]) -> ImportWork:
    """The worker's side of `import_jobs`."""
    return ImportWork(Store(config["source"]), stage, config["places"])


class ImportWork:
    """Rebuilds the tars of one shard at a time."""

    def __init__(self, source: Store, stage: Stage, places: dict[str, int]) -> None:
        self._source, self._stage, self._places = source, stage, places
        self._about = read_about(source)
        parts = [Part.from_dict(part) for part in self._about["parts"]]
        self._parts = [part for part in parts if _stage_of(part) == stage.name]

    def run(self, shard: int) -> ShardData:
        """One shard.

        Raises:
            TornShard: a tar does not come out as it was exported.
        """
        began = time.monotonic()
        number = self._places[str(shard)]
        entry = self._about["shards"][number]
        content = read_shard(self._about["layout"], self._source, number, self._parts)
        outputs = {output_of(part.modality): to_tar(part, content) for part in self._parts}
        for part in self._parts:
            expected = entry["sha256"].get(part.name)
            found = hashlib.sha256(outputs[output_of(part.modality)]).hexdigest()
            if expected and found != expected:
                raise TornShard(
                    f"{part.name} of shard {shard} in {self._source.url} is not what was "
                    f"exported: its tar has sha256 {found[:12]}, expected {expected[:12]}"
                )
        holes = content.holes()
        return ShardData(
            keys=content.keys,
            outputs=outputs,
            statuses=[
                (key, "missing_label" if row in holes else OK, "")
                for row, key in enumerate(content.keys)
            ],
            seconds=time.monotonic() - began,
        )


def finish_import(store: Store, source: Store) -> Manifest | None:
    """Publish what was imported, once every shard is; None for a set without tokens.

    Raises:
        ValueError: shards are missing; says which.
    """
    about, ledger = read_about(source), Ledger(store)
    stages = _stages(about)
    numbers = [entry["shard"] for entry in about["shards"]]
    for stage in stages:
        if left := sorted(set(numbers) - ledger.committed(stage)):
            raise ValueError(f"{stage.name} lacks shard {left[0]} ({len(left)} of {len(numbers)})")
    by_name = {stage.name: stage for stage in stages}
    labels = by_name.get(_LABELS)
    if labels:
        chain.remember(store, SECTION, dict.fromkeys(labels.outputs, labels.id))
    parts = [Part.from_dict(part) for part in about["parts"]]
    published = {
        part.modality: by_name[_stage_of(part)]
        for part in parts
        if part.modality in about["modalities"] and (part.is_tokens or part.modality == "rgb")
    }
    if not any(part.is_tokens and part.modality in published for part in parts):
        return None
    for path in source.list("tokenizers/"):
        store.write(path, source.read(path))
    return publish(
        ledger,
        about["name"],
        published,
        numbers,
        splits={split: [numbers[i] for i in at] for split, at in about["splits"].items()},
        tokenizers=about["tokenizers"],
        meta={"crops": about["crops"]},
    )
