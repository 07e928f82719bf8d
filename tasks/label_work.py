"""Labelling at work: a network writes modalities for the pictures of a shard.

A label shard holds the keys of its `rgb` shard in the same order. A picture that cannot be
labelled becomes an explicit hole with a reason in the status table, never a shift.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from infra.buckets import Buckets
from infra.ledger import Ledger, ShardData, Stage
from infra.overlap import Waits, pipelined
from infra.shards import MISSING_EXT, TarIndex, hole, read_tar, split_name, write_tar
from infra.store import Store
from infra.units import SystemicFailure
from models import modalities
from models.labelers import Labeler, LabelerSpec, load_labeler
from tasks.tokenizer_data import read_label

logger = logging.getLogger("fourm.label")

BATCHES_AT_ONCE = 2
"""Batches that are read together."""
MOST_PIXELS = 2**25
"""Pixels of pictures that wait for others of their shape: 100 MB, or 380 pictures of 256 x 341."""


@dataclass
class Sample:
    """A picture on its way through a labeler; in the end `members` holds its labels as files."""

    key: str
    data: bytes
    others: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    reason: str = "ok"
    detail: str = ""
    done: bool = False

    def fail(self, reason: str, error: Exception | str) -> None:
        self.reason, self.detail = reason, str(error)[:500]


def build_work(store_url: str, stage: Stage, config: dict[str, Any]) -> LabelWork:
    """Build the worker's side of `tasks.label.label_jobs`: load the network.

    Raises:
        SystemicFailure: The weights cannot be loaded.
    """
    spec = LabelerSpec.from_dict(config)
    try:
        labeler = load_labeler(spec)
    except (OSError, ValueError) as error:
        raise SystemicFailure(
            f"labeler {spec.name!r} cannot load {spec.model_id!r} (revision "
            f"{spec.revision or 'default'}): {error}"
        ) from error
    return LabelWork(Store(store_url), stage, labeler)


class LabelWork:
    """Labels one shard at a time; decoding and encoding overlap with the network."""

    def __init__(self, store: Store, stage: Stage, labeler: Labeler) -> None:
        self._ledger = Ledger(store)
        self._stage = stage
        self._fetch = next(each for each in stage.upstream if "rgb" in each.outputs)
        self._labeler = labeler
        self._group = labeler.spec.batch_size * BATCHES_AT_ONCE
        # A labeler's caption goes before the list's, as the later stage upstream.
        self._sources = {
            name: each
            for each in stage.upstream
            for name in each.outputs
            if name != "rgb" and name in (*labeler.reads, *labeler.also_reads)
        }

    def run(self, shard: int) -> ShardData:
        """Label the pictures of a shard.

        Raises:
            RuntimeError: No picture of the shard could be labelled: the fault is not theirs.
            MemoryError: A single picture is too large for the memory.
        """
        (data,) = self.run_with((), shard)
        return data

    def run_with(self, others: Sequence[LabelWork], shard: int) -> list[ShardData]:
        """Label a shard with several labelers; its pictures are read and decoded once.

        Each labeler meets the batches that it meets alone, hence writes the same bytes.

        Raises:
            As `run`, for the first labeler that cannot.
        """
        started, waits = time.monotonic(), Waits()
        works = (self, *others)
        samples: list[list[Sample]] = [[] for _ in works]
        for number, group in _one_pass(works, shard, waits):
            samples[number] += group
        seconds, waited = (time.monotonic() - started) / len(works), waits.record(len(works))
        return [
            work._data(shard, each, seconds, waited)
            for work, each in zip(works, samples, strict=True)
        ]

    def samples(self, shard: int) -> Iterator[list[Sample]]:
        """The labelled pictures of a shard in order, a few batches at a time.

        Raises:
            As `run`.
        """
        reasons, detail = Counter[str](), ""
        for _, group in _one_pass((self,), shard):
            reasons.update(sample.reason for sample in group)
            detail = detail or next((sample.detail for sample in group if sample.detail), "")
            yield group
        _refuse_if_hopeless(self._stage, shard, reasons, detail)

    def _data(
        self, shard: int, samples: list[Sample], seconds: float, waited: dict[str, float]
    ) -> ShardData:
        detail = next((sample.detail for sample in samples if sample.detail), "")
        reasons = Counter(sample.reason for sample in samples)
        _refuse_if_hopeless(self._stage, shard, reasons, detail)
        return ShardData(
            keys=[sample.key for sample in samples],
            outputs={output: _tar(samples, output) for output in self._stage.outputs},
            statuses=[(sample.key, sample.reason, sample.detail) for sample in samples],
            seconds=seconds,
            waited=waited,
        )

    def _rows(self, works: Sequence[LabelWork], shard: int) -> Iterator[list[Sample]]:
        """For each picture a sample of every labeler."""
        path, sha256 = self._ledger.open_output(self._fetch, shard, "rgb")
        others = [
            {name: work._index(stage, shard, name) for name, stage in work._sources.items()}
            for work in works
        ]
        for name, data in read_tar(path, sha256=sha256):
            key, extension = split_name(name)
            row = [Sample(key, data) for _ in works]
            for work, sample, indices in zip(works, row, others, strict=True):
                if extension == MISSING_EXT:
                    sample.fail("no_picture", "the fetch stage left a hole")
                else:
                    work._read_others(sample, indices)
            yield row

    def _index(self, stage: Stage, shard: int, name: str) -> TarIndex:
        path, sha256 = self._ledger.open_output(stage, shard, name)
        return TarIndex(path, sha256=sha256)

    def _read_others(self, sample: Sample, others: dict[str, TarIndex]) -> None:
        for name, index in others.items():
            if index.ext(sample.key) != MISSING_EXT:
                sample.others[name] = index.read(sample.key)
            elif name in self._labeler.reads:
                sample.fail("no_label", f"{self._sources[name].id} left a hole")

    def _decode(self, sample: Sample, picture: Callable[[bytes], Any]) -> None:
        data, others = sample.data, sample.others
        sample.data, sample.others = b"", {}
        if sample.reason != "ok":
            return
        try:
            inputs = {"rgb": picture(data)} if "rgb" in self._labeler.reads else {}
            for name, each in others.items():
                inputs[name] = read_label(name, sample.key, each)
            sample.inputs = inputs
        except (OSError, ValueError, SyntaxError) as error:
            sample.fail("undecodable", error)

    def _buckets(self) -> Buckets[Sample]:
        """Of samples that the network sees in one shape, which meet across others."""
        size = self._labeler.spec.batch_size * self._labeler.at_once
        return Buckets(size=size, most=MOST_PIXELS)

    def _put(self, buckets: Buckets[Sample], sample: Sample) -> list[list[Sample]]:
        if sample.reason != "ok":
            sample.done = True
            return []
        pixels = sample.inputs["rgb"].size // 3 if "rgb" in sample.inputs else 0
        return buckets.add(sample, kind=self._labeler.alike(sample.inputs), cost=pixels)

    def _label(self, samples: list[Sample]) -> None:
        try:
            self._label_together(samples)
        except (RuntimeError, ValueError) as error:
            logger.warning("%s: a batch failed, one at a time: %s", self._stage.id, error)
            for sample in samples:
                self._label_alone(sample)
        for sample in samples:
            sample.inputs = {}

    def _label_together(self, samples: list[Sample]) -> None:
        labels = self._labeler.label_samples([sample.inputs for sample in samples])
        for number, sample in enumerate(samples):
            sample.values = {name: values[number] for name, values in labels.items()}

    def _label_alone(self, sample: Sample) -> None:
        try:
            self._label_together([sample])
        except (RuntimeError, ValueError) as error:
            sample.fail("unlabelled", error)

    def _encode(self, samples: list[Sample]) -> list[Sample]:
        for sample in samples:
            try:
                sample.members = {
                    name: modalities.get(name).encode(value)
                    for name, value in sample.values.items()
                }
            except ValueError as error:  # such as a number that is not finite
                sample.fail("unlabelled", error)
            sample.values = {}
        return samples


def _one_pass(
    works: Sequence[LabelWork], shard: int, waits: Waits | None = None
) -> Iterator[tuple[int, list[Sample]]]:
    """Groups of labelled pictures of a shard, each with its labeler's number, in order for each;
    the pictures are read and decoded once for all. `waits` counts how long the networks waited."""
    rows = _batched(works[0]._rows(works, shard), min(work._group for work in works))
    buckets = [work._buckets() for work in works]
    lines: list[deque[Sample]] = [deque() for _ in works]
    for batches in pipelined(
        chain(rows, [None]),
        lambda rows: rows and [_decoded(works, row) for row in rows],
        lambda rows: _labelled(works, buckets, lines, rows),
        lambda batches: [work._encode(batch) for work, batch in batches],
        waits=waits,
    ):
        for sample in chain.from_iterable(batches):
            sample.done = True
        for number, line in enumerate(lines):
            if group := list(_first_done(line)):
                yield number, group


def _first_done(line: deque[Sample]) -> Iterator[Sample]:
    while line and line[0].done:
        yield line.popleft()


def _batched(rows: Iterator[list[Sample]], size: int) -> Iterator[list[list[Sample]]]:
    while batch := list(islice(rows, size)):
        yield batch


def _decoded(works: Sequence[LabelWork], row: list[Sample]) -> list[Sample]:
    picture = lru_cache(1)(modalities.get("rgb").decode)
    for work, sample in zip(works, row, strict=True):
        work._decode(sample, picture)
    return row


def _labelled(
    works: Sequence[LabelWork], buckets: Sequence[Buckets[Sample]],
    lines: Sequence[deque[Sample]], rows: list[list[Sample]] | None,
) -> list[tuple[LabelWork, list[Sample]]]:  # fmt: skip
    """Batches that became due with these rows, labelled, each with its labeler.

    Args:
        works: Of the labelers.
        buckets: Of each labeler, with the samples that wait for others.
        lines: Of each labeler, the samples in the order of the pictures.
        rows: More samples of all; None when there are no more.
    """
    ready = []
    for number, (work, each, line) in enumerate(zip(works, buckets, lines, strict=True)):
        line.extend(row[number] for row in rows or ())
        due = [each.rest()] if rows is None else [work._put(each, row[number]) for row in rows]
        for batch in chain.from_iterable(due):
            work._label(batch)
            ready.append((work, batch))
    return ready


def _refuse_if_hopeless(stage: Stage, shard: int, reasons: Counter[str], detail: str) -> None:
    if reasons["unlabelled"] == reasons.total() > 0:
        raise RuntimeError(f"{stage.id} labelled no picture of shard {shard}; the first: {detail}")


def _tar(samples: list[Sample], output: str) -> bytes:
    extension = modalities.get(output).ext
    return write_tar(
        (f"{sample.key}.{extension}", sample.members[output])
        if sample.members
        else hole(sample.key, sample.reason)
        for sample in samples
    )
