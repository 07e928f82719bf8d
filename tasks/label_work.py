"""Labelling at work: a network writes modalities for the pictures of a shard.

A label shard holds the keys of its `rgb` shard in the same order. A picture that cannot be
labelled becomes an explicit hole with a reason in the status table, never a shift.

While a network works on a batch, another thread reads, decodes and prepares the next ones and a
third finishes and encodes the ones before: of a labeler on a CPU that is `InParts` the network's
thread has nothing but the network to run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any

from infra.buckets import Buckets
from infra.fitting import gpu_lost
from infra.ledger import Ledger, ShardData, Stage
from infra.overlap import Lane, Waits
from infra.shards import MISSING_EXT, TarIndex, hole, read_tar, split_name, write_tar
from infra.store import Store
from infra.units import SystemicFailure
from models import modalities
from models.labelers import Labeler, LabelerSpec, load_labeler
from models.labelers.base import ORIGINAL_SIZE
from models.labelers.inputs import InParts
from tasks.tokenizer_data import original_sizes, read_label

logger = logging.getLogger("fourm.label")

MOST_PIXELS = 2**25
"""Pixels of pictures that wait for others of their shape: 100 MB, or 380 pictures of 256 x 341."""


@dataclass
class Sample:
    """A picture on its way through a labeler; in the end `members` holds its labels as files."""

    key: str
    data: bytes
    size: tuple[int, int] | None = None
    others: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    reason: str = "ok"
    detail: str = ""
    done: bool = False

    def fail(self, reason: str, error: Exception | str) -> None:
        kind = "" if isinstance(error, (str, ValueError)) else f"{type(error).__name__}: "
        self.reason, self.detail = reason, f"{kind}{error}"[:500]


@dataclass
class Batch:
    """Samples that meet in the network of a labeler."""

    work: LabelWork
    samples: list[Sample]
    images: list[Any] = field(default_factory=list)
    inputs: Any = None
    """Of the network, where they were prepared ahead of it."""
    outputs: Any = None
    """Of the network, where they are to be finished behind it."""


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
    """Labels shards; decoding and encoding overlap with the network, which has one shard at a time.

    Several threads may `run` at once.
    """

    def __init__(self, store: Store, stage: Stage, labeler: Labeler) -> None:
        self._ledger = Ledger(store)
        self._stage = stage
        self._fetch = next(each for each in stage.upstream if "rgb" in each.outputs)
        self._labeler = labeler
        self._parts = labeler if isinstance(labeler, InParts) and labeler.apart else None
        self._lane = Lane()
        # A labeler's caption goes before the list's, as the later stage upstream.
        self._sources = {
            name: each
            for each in stage.upstream
            for name in each.outputs
            if name != "rgb" and name in (*labeler.reads, *labeler.also_reads)
        }

    def close(self) -> None:
        """Ends the network's thread."""
        self._lane.close()

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
        seconds = (time.monotonic() - started - waits.turn) / len(works)
        waited = waits.record(len(works))
        return [
            work._data(shard, each, seconds, waited)
            for work, each in zip(works, samples, strict=True)
        ]

    def samples(self, shard: int) -> Iterator[list[Sample]]:
        """The labelled pictures of a shard in order, a few batches at a time; raises as `run`."""
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
            # What "auto" was here: the workers of a run may be of several kinds.
            info={"device": self._labeler.device.type, "precision": self._labeler.precision},
            waited=waited,
        )

    def _rows(self, works: Sequence[LabelWork], shard: int) -> Iterator[list[Sample]]:
        """For each picture a sample of every labeler."""
        path, sha256 = self._ledger.open_output(self._fetch, shard, "rgb")
        others = [
            {name: work._index(stage, shard, name) for name, stage in work._sources.items()}
            for work in works
        ]
        asked = any(work._labeler.asks_size for work in works)
        sizes = original_sizes(self._ledger, self._fetch, shard) if asked else {}
        for name, data in read_tar(path, sha256=sha256):
            key, extension = split_name(name)
            row = [Sample(key, data, sizes.get(key)) for _ in works]
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
        with _hole(sample, "undecodable", OSError):  # which is what broken pictures are to Pillow
            inputs: dict[str, Any] = {"rgb": picture(data)} if "rgb" in self._labeler.reads else {}
            if self._labeler.asks_size:
                inputs[ORIGINAL_SIZE] = sample.size
            for name, each in others.items():
                inputs[name] = read_label(name, sample.key, each)
            sample.inputs = inputs

    def _buckets(self) -> Buckets[Sample]:
        """Of samples that the network sees in one shape, which meet across others."""
        size = self._labeler.spec.batch_size * self._labeler.at_once
        return Buckets(size=size, most=MOST_PIXELS)

    def _put(self, buckets: Buckets[Sample], sample: Sample) -> list[list[Sample]]:
        if sample.reason == "ok":
            with _hole(sample, "unlabelled"):
                kind = self._labeler.alike(sample.inputs)
                pixels = sample.inputs["rgb"].size // 3 if "rgb" in sample.inputs else 0
                return buckets.add(sample, kind=kind, cost=pixels)
        sample.done = True
        return []

    def _prepared(self, samples: list[Sample]) -> Iterator[Batch]:
        """Batches of alike samples as the network takes them, as far as it takes them prepared."""
        if self._parts is None:
            yield Batch(self, samples)
            return
        size = self._parts.fitting
        for start in range(0, len(samples), size):
            batch = Batch(self, samples[start : start + size])
            batch.images = self._parts.filled([each.inputs["rgb"] for each in batch.samples])
            batch.inputs = self._tried(self._parts.prepare, batch.images)
            yield batch

    def _label(self, batch: Batch) -> None:
        if self._parts is not None and batch.inputs is not None:
            batch.outputs = self._tried(self._parts.forward, batch.inputs)
            batch.inputs = None
        if batch.outputs is None:
            self._label_whole(batch.samples)

    def _finish(self, batch: Batch) -> None:
        if self._parts is not None and batch.outputs is not None:
            labels = self._tried(self._parts.finish, batch.outputs, batch.images)
            batch.outputs = None
            if labels is None:
                self._label_whole(batch.samples)
            else:
                _spread(labels, batch.samples)
        batch.images = []
        for sample in batch.samples:
            sample.inputs = {}
        self._lane.each(self._encode, batch.samples)

    def _tried(self, part: Callable[..., Any], *given: Any) -> Any:
        """What a part of the labeler makes; None where it fails: the batch is then labelled whole,
        which deals with what goes wrong, and tells of it."""
        try:
            with self._labeler.inference():
                return part(*given)
        except Exception as error:  # noqa: BLE001 - of the network's, any kind
            _accept(error, MemoryError)
            return None

    def _label_whole(self, samples: list[Sample]) -> None:
        try:
            self._label_together(samples)
        except Exception as error:  # noqa: BLE001 - of the network's, any kind
            _accept(error)
            logger.warning("%s: a batch failed, one at a time: %s", self._stage.id, error)
            for sample in samples:
                self._label_alone(sample)

    def _label_together(self, samples: list[Sample]) -> None:
        _spread(self._labeler.label_samples([sample.inputs for sample in samples]), samples)

    def _label_alone(self, sample: Sample) -> None:
        with _hole(sample, "unlabelled"):
            self._label_together([sample])

    def _encode(self, sample: Sample) -> None:
        with _hole(sample, "unlabelled"):  # such as a number that is not finite
            values = sample.values.items()
            sample.members = {name: modalities.get(name).encode(each) for name, each in values}
        sample.values = {}
        sample.done = True


@contextmanager
def _hole(sample: Sample, reason: str, *also: type[Exception]) -> Iterator[None]:
    """What goes wrong within, of whatever kind, is a hole at the place of the sample."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - one picture must not be the end of its shard
        _accept(error, *also)
        sample.fail(reason, error)


def _accept(error: Exception, *also: type[Exception]) -> None:
    """Raise again what no picture is to blame for: too little memory, a disk, a lost GPU; but not
    what is `also` accepted."""
    theirs = not isinstance(error, (MemoryError, OSError, SystemicFailure))
    if not (theirs or isinstance(error, also)) or gpu_lost(error):
        raise error


def _spread(labels: dict[str, list[Any]], samples: list[Sample]) -> None:
    for number, sample in enumerate(samples):
        sample.values = {name: values[number] for name, values in labels.items()}


def _one_pass(
    works: Sequence[LabelWork], shard: int, waits: Waits | None = None
) -> Iterator[tuple[int, list[Sample]]]:
    """Groups of labelled pictures of a shard, each with its labeler's number, in order for each;
    the pictures are read and decoded once for all. `waits` counts how long the networks waited."""
    size = min(work._labeler.spec.batch_size for work in works)
    groups = _batched(works[0]._rows(works, shard), size)
    buckets = [work._buckets() for work in works]
    lines: list[deque[Sample]] = [deque() for _ in works]
    for rows in works[0]._lane.pipelined(
        chain(groups, [None]),
        lambda rows: (rows or [], _ahead(works, buckets, rows)),
        _labelled,
        _finished,
        waits=waits,
    ):
        for number, line in enumerate(lines):
            line.extend(row[number] for row in rows)
            if group := list(_first_done(line)):
                yield number, group


def _first_done(line: deque[Sample]) -> Iterator[Sample]:
    while line and line[0].done:
        yield line.popleft()


def _batched(rows: Iterator[list[Sample]], size: int) -> Iterator[list[list[Sample]]]:
    while batch := list(islice(rows, size)):
        yield batch


def _decode(works: Sequence[LabelWork], row: list[Sample]) -> None:
    picture = lru_cache(1)(modalities.get("rgb").decode)
    for work, sample in zip(works, row, strict=True):
        work._decode(sample, picture)


def _ahead(
    works: Sequence[LabelWork], buckets: Sequence[Buckets[Sample]], rows: list[list[Sample]] | None
) -> list[Batch]:
    """Batches that become due with more rows, decoded and prepared.

    Args:
        works: Of the labelers.
        buckets: Of each labeler, with the samples that wait for others.
        rows: For each picture a sample of every labeler; None when there are no more.
    """
    works[0]._lane.each(partial(_decode, works), rows or ())
    ready: list[Batch] = []
    for number, (work, each) in enumerate(zip(works, buckets, strict=True)):
        due = [each.rest()] if rows is None else [work._put(each, row[number]) for row in rows]
        for samples in chain.from_iterable(due):
            ready += work._prepared(samples)
    return ready


def _labelled(step: tuple[list[Any], list[Batch]]) -> tuple[list[Any], list[Batch]]:
    for batch in step[1]:
        batch.work._label(batch)
    return step


def _finished(step: tuple[list[Any], list[Batch]]) -> list[Any]:
    rows, batches = step
    for batch in batches:
        batch.work._finish(batch)
    return rows


def _refuse_if_hopeless(stage: Stage, shard: int, reasons: Counter[str], detail: str) -> None:
    if reasons["unlabelled"] and not reasons["ok"]:
        raise RuntimeError(f"{stage.id} labelled no picture of shard {shard}; the first: {detail}")


def _tar(samples: list[Sample], output: str) -> bytes:
    extension = modalities.get(output).ext
    return write_tar(
        (f"{sample.key}.{extension}", sample.members[output])
        if sample.members
        else hole(sample.key, sample.reason)
        for sample in samples
    )
