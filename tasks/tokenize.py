"""Tokenizing: every modality of every sample becomes rows of token blocks, several crops each.

One unit reads one label shard. A thread decodes and crops ahead while the network encodes, another
writes behind it; the windows are a pure function of (key, crop index), so modalities agree without
a crop file. A missing label stays a hole: a null in every column, under the same key. Labels that
are not worth storing, such as feature maps, can be made and tokenized in one pass (`token_jobs`,
`labelers`).
Windows do not depend on the side of the crops, so sets of several sides show the same regions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.blocks import BlockWriter, Column
from infra.ledger import OK, Ledger, ShardData, Stage
from infra.machine import chosen_device
from infra.overlap import UNITS_AT_ONCE, Lane, Waits
from infra.runner import StageJob
from infra.shards import MISSING_EXT, TarIndex
from infra.store import Store
from models import modalities
from models.crops import CropPolicy, crop_box
from tasks.label_work import LabelWork
from tasks.label_work import build_work as label_work
from tasks.tokenizer_data import Aspects, aspect_of, read_label
from tasks.train_tokenizers import TEXT, TokenizerInfo, read_info
from tokenizers_vq.sequences.form import Page, TextForm, seed_of

if TYPE_CHECKING:
    from models.labelers import LabelerSpec
    from tokenizers_vq.text import TextTokenizer
    from tokenizers_vq.tokenizer import Tokenizer

VERSION = 1
_GROUP = 32  # samples decoded ahead as one group
_Prepared = tuple[str, list[Any] | None, str]
"""Key, one prepared value per crop or None for a hole, status."""
_Tokens = dict[str, np.ndarray | list[int] | None]
_Row = tuple[str, _Tokens, str]


def output_name(modality: str) -> str:
    """Name of a modality's tokens: tok_depth; what is told as text keeps its name."""
    return modality if modalities.text_form(modality) else f"tok_{modality}"


def published_name(stage: Stage) -> str:
    """Name of a token stage's output in manifests: tok_depth, or tok_depth@448 where it is of
    another size than the set's own."""
    return "@".join([stage.outputs[0], *stage.name.split(":")[2:]])


def token_stage(
    modality: str,
    tokenizer: TokenizerInfo,
    policy: CropPolicy,
    upstream: Stage,
    *,
    codes: TokenizerInfo | None = None,
    min_score: float | None = None,
    kept: int = 0,
    size: int = 0,
) -> Stage:
    """The stage that tokenizes one modality.

    Args:
        modality: Whose values are tokenized.
        tokenizer: Of that modality, or the text tokenizer.
        policy: Crops of the token set.
        upstream: The stage that wrote the values.
        codes: The modality's learned tokenizer, where its text holds codes.
        min_score: Least confidence of what is written, where the text leaves out what is unsure;
            None is the form's own.
        kept: Number of ordered tokens that are stored; 0 stores all.
        size: Side of the crops in pixels, where it is not that of `policy`: one more set, of the
            same regions. Feature maps upstream are as many times finer.

    Raises:
        ValueError: if the stage upstream does not write the modality, the tokenizer is another's,
            codes are missing, so few tokens do not decode, or the side is no multiple of a token's.
    """
    if modality not in upstream.outputs:
        raise ValueError(f"{upstream.id} writes {', '.join(upstream.outputs)}, not {modality!r}")
    form = modalities.text_form(modality)
    expected = modality if form is None else TEXT
    if tokenizer.modality != expected:
        raise ValueError(f"{modality!r} needs the {expected} tokenizer, not {tokenizer.modality}'s")
    params: dict[str, Any] = {"crops": asdict(replace(policy, size=size or policy.size))}
    if form is not None and form.min_score is not None:
        params["min_score"] = form.min_score if min_score is None else min_score
    if form is not None and form.parts is not None:
        if codes is None:
            raise ValueError(f"the text of {modality!r} holds codes: it needs its own tokenizer")
        params |= {"codes": codes.path, "codes_fingerprint": codes.fingerprint}
    if kept:
        params["tokens"] = tokenizer.length(policy.size, kept)
    if size and tokenizer.patch:
        tokenizer.length(size)  # refuses a side that cuts a token in two
    elif size:
        params["tokens"] = tokenizer.num_tokens * size**2 // policy.size**2
    return Stage(
        name=f"tokens:{modality}:{size}" if size else f"tokens:{modality}",
        version=VERSION,
        params=params,
        outputs=(output_name(modality),),
        upstream=(upstream,),
        model=tokenizer.path,
        revision=tokenizer.fingerprint,
    )


def _modality(stage: Stage) -> str:
    return stage.name.split(":")[1]


def token_jobs(
    stages: Iterable[Stage],
    shards: Sequence[int],
    *,
    precision: str = "auto",
    device: str = "auto",
    labelers: Mapping[Stage, LabelerSpec] | None = None,
) -> list[StageJob]:
    """The stages of `token_stage` as work for the stage runner.

    `labelers` are those of label stages that keep nothing of most shards: what such a stage has
    not committed is labelled and tokenized in one pass, to the same tokens, and not stored.
    """
    config = {"precision": precision, "device": device}
    made = {stage: {"labeler": spec.to_dict()} for stage, spec in (labelers or {}).items()}
    return [
        StageJob(stage, "tasks.tokenize:build_work", config | made.get(stage.upstream[0], {}),
                 tuple(shards), at_once=UNITS_AT_ONCE)
        for stage in stages
    ]


def build_work(store_url: str, stage: Stage, config: dict[str, Any]) -> TokenizeWork:
    """The worker's side of `token_jobs`.

    Raises:
        ValueError: if the stored tokenizer is not the one of the stage.
    """
    store = Store(store_url)
    form = modalities.text_form(_modality(stage))
    encoder = _Learned(store, stage, config) if form is None else _Text(store, stage, config, form)
    labels = None
    if "labeler" in config:
        labels = label_work(store_url, stage.upstream[0], config["labeler"])
    return TokenizeWork(store, stage, encoder, labels)


class TokenizeWork:
    """Tokenizes shards of one modality; its network has one at a time. Several threads may `run`.

    Args:
        store: The dataset.
        stage: Of `token_stage`.
        encoder: Its tokenizer.
        labels: Labels the pictures of shards whose labels are not stored.
    """

    def __init__(
        self, store: Store, stage: Stage, encoder: _Learned | _Text,
        labels: LabelWork | None = None,
    ) -> None:
        self._labels = labels
        self._ledger = Ledger(store)
        self._stage, self._encoder = stage, encoder
        self._modality = _modality(stage)
        self._policy = CropPolicy(**stage.params["crops"])
        self._columns = [f"crop{i}" for i in range(self._policy.num_crops)]
        self._lane = Lane()

    def close(self) -> None:
        """Ends the threads of its networks."""
        self._lane.close()
        if self._labels is not None:
            self._labels.close()

    def run(self, shard: int) -> ShardData:
        """Reads one label shard and returns its token shard."""
        began = time.monotonic()
        metadata = {
            "modality": self._stage.outputs[0],
            "tokenizer": self._stage.model,
            "tokenizer_fingerprint": self._stage.revision,
            "vocab_size": str(self._encoder.vocab_size),
        }
        column = Column("uint16", self._encoder.length)
        writer = BlockWriter(dict.fromkeys(self._columns, column), metadata)
        statuses: list[tuple[str, str, str]] = []
        waits = Waits()
        prepare = partial(self._prepared, Aspects(self._ledger, self._stage.upstream[0], shard))
        encode = partial(self._encoder.encode, columns=self._columns)
        before: Callable[..., Any] = prepare
        work: Callable[..., Any] = encode
        if not self._encoder.ahead:
            before, work = list, lambda group: encode(prepare(group))
        write = partial(_write, writer)
        members = self._members(shard)
        for written in self._lane.pipelined(members, before, work, write, waits=waits):
            statuses += written
        keys = [key for key, _, _ in statuses]
        reasons = Counter(reason for _, reason, _ in statuses)
        return ShardData(
            keys=keys,
            outputs={self._stage.outputs[0]: writer.finish()},
            statuses=statuses,
            seconds=time.monotonic() - began - waits.turn,
            info={"holes": len(keys) - reasons[OK], "crops": self._policy.num_crops},
            waited=waits.record(),
        )

    def _prepared(
        self, aspects: Aspects, group: list[tuple[str, bytes | None]]
    ) -> list[_Prepared]:
        sample = partial(self._sample, aspects)
        if self._encoder.ahead:
            return self._lane.each(sample, group)
        return [sample(each) for each in group]  # in the lane itself, where texts hold codes

    def _members(self, shard: int) -> Iterator[list[tuple[str, bytes | None]]]:
        """Groups of (key, label file or None for a hole): stored ones, or made for this."""
        upstream = self._stage.upstream[0]
        if self._labels is not None and not self._ledger.is_committed(upstream, shard):
            for batch in self._labels.samples(shard):
                yield [(sample.key, sample.members.get(self._modality)) for sample in batch]
            return
        path, sha256 = self._ledger.open_output(upstream, shard, self._modality)
        index = TarIndex(path, sha256=sha256)
        keys = iter(index.keys)
        while group := list(islice(keys, _GROUP)):
            yield [
                (key, None if index.ext(key) == MISSING_EXT else index.read(key)) for key in group
            ]

    def _sample(self, aspects: Aspects, sample: tuple[str, bytes | None]) -> _Prepared:
        key, data = sample
        if data is None:
            return key, None, "missing_label"
        modality, count = modalities.get(self._modality), self._policy.num_crops
        value = read_label(self._modality, key, data)
        if modality.text is not None and modality.text.whole:
            return key, [self._encoder.prepare(value, key, 0)] * count, OK
        aspect = aspect_of(self._modality, value, key, aspects)
        boxes = (crop_box(self._policy, key, i, aspect) for i in range(count))
        crops = [modality.crop(value, box, self._policy.size) for box in boxes]
        return key, [self._encoder.prepare(crop, key, i) for i, crop in enumerate(crops)], OK


def _write(writer: BlockWriter, rows: list[_Row]) -> list[tuple[str, str, str]]:
    """Status rows of what is now written."""
    for key, row, _ in rows:
        writer.add(key, row)
    return [(key, reason, "") for key, _, reason in rows]


class _Learned:
    """Encodes maps in batches of all crops of a group."""

    ahead = True
    """Whether values are prepared ahead, beside the calling thread, whose the networks are."""

    def __init__(self, store: Store, stage: Stage, config: dict[str, Any]) -> None:
        self._tokenizer = _learned(store, stage.model, stage.revision, stage, config)
        self.vocab_size = self._tokenizer.vocab_size
        patch, size = self._tokenizer.scaling_patch, stage.params["crops"]["size"]
        whole = (size // patch) ** 2 if patch else self._tokenizer.num_tokens
        self.length: int | None = stage.params.get("tokens", whole)

    def prepare(self, value: np.ndarray, key: str, crop: int) -> np.ndarray:
        """Packs a crop."""
        return self._tokenizer.codec.pack(value)

    def encode(self, group: list[_Prepared], columns: list[str]) -> list[_Row]:
        """(key, tokens by column, status) of every sample in order."""
        packed = [crop for _, crops, _ in group for crop in crops or ()]
        encoded = self._tokenizer.encode_packed(np.stack(packed)) if packed else ()
        tokens = iter(row[: self.length] for row in encoded)
        return [
            (key, {name: None if crops is None else next(tokens) for name in columns}, reason)
            for key, crops, reason in group
        ]


class _Text:
    """Encodes what is told as text."""

    def __init__(
        self, store: Store, stage: Stage, config: dict[str, Any], form: TextForm
    ) -> None:
        from tokenizers_vq.text import FILE, TextTokenizer
        from tokenizers_vq.tokenizer import fingerprint

        data = store.read(f"{stage.model}/{FILE}")
        _require(fingerprint({FILE: data}), stage.model, stage.revision, stage)
        self._tokenizer: TextTokenizer = TextTokenizer.from_bytes(data)
        self._modality, self._form = _modality(stage), form
        self._form.check_bins(self._modality, self._tokenizer.bins)
        codes, params = None, stage.params
        if form.parts is not None:
            codes = _learned(store, params["codes"], params["codes_fingerprint"], stage, config)
        self.ahead = codes is None
        self._page = Page(
            bins=self._tokenizer.bins, size=params["crops"]["size"], codes=codes,
            min_score=params.get("min_score"),
        )  # fmt: skip
        self.vocab_size = self._tokenizer.vocab_size
        self.length: int | None = None

    def prepare(self, value: Any, key: str, crop: int) -> str:
        """Writes what a crop shows as text."""
        return self._form.write(value, replace(self._page, seed=seed_of(self._modality, key, crop)))

    def encode(self, group: list[_Prepared], columns: list[str]) -> list[_Row]:
        """(key, ids by column, status) of every sample in order."""
        # Crops share captions, so each text is encoded once.
        texts = list(dict.fromkeys(text for _, crops, _ in group for text in crops or ()))
        ids = dict(zip(texts, self._tokenizer.encode_batch(texts), strict=True))
        rows: list[_Row] = []
        for key, crops, reason in group:
            values = [None] * len(columns) if crops is None else [ids[text] for text in crops]
            rows.append((key, dict(zip(columns, values, strict=True)), reason))
        return rows


def _learned(
    store: Store, path: str, expected: str, stage: Stage, config: dict[str, Any]
) -> Tokenizer:
    """A stored network on the device that is asked for."""
    from tokenizers_vq.tokenizer import fingerprint, load_tokenizer

    tokenizer = load_tokenizer(store, path, config.get("precision", "auto"))
    _require(fingerprint(tokenizer.files()), path, expected, stage)
    return tokenizer.to(chosen_device(config.get("device", "auto")))


def _require(found: str, path: str, expected: str, stage: Stage) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is not the tokenizer of {stage.id}: its fingerprint is {found[:12]}, "
            f"expected {expected[:12]}"
        )


def tokenizer_infos(store: Store, paths: Mapping[str, str]) -> dict[str, TokenizerInfo]:
    """Reads back the records of stored tokenizers, modality to folder."""
    return {name: read_info(store, path) for name, path in paths.items()}
