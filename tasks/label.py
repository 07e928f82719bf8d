"""Labelling: a network writes modalities for the pictures that were fetched, shard by shard.

A label shard holds the keys of its `rgb` shard in the same order. A picture that cannot be
labelled becomes an explicit hole with a reason in the status table, never a shift.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np

from infra.ledger import Ledger, ShardData, Stage
from infra.overlap import pipelined
from infra.shards import MISSING_EXT, hole, read_tar, split_name, write_tar
from infra.store import Store
from infra.units import StageJob, SystemicFailure
from models import modalities
from models.labelers import Labeler, LabelerSpec, load_labeler, weights_revision

logger = logging.getLogger("fourm.label")

VERSION = 1
BATCHES_AT_ONCE = 2
"""Batches handed to a labeler together: pictures of one size find each other in them."""


@dataclass
class _Sample:
    key: str
    data: bytes
    image: np.ndarray | None = None
    values: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    reason: str = "ok"
    detail: str = ""

    def fail(self, reason: str, error: Exception | str) -> None:
        self.reason, self.detail = reason, str(error)[:500]


def label_stage(spec: LabelerSpec, fetch: Stage) -> Stage:
    """Return the stage of a labeler over fetched pictures.

    Batch size and device change no label and are not part of it; precision is.

    Args:
        spec: The labeler.
        fetch: A stage that writes `rgb`.

    Raises:
        ValueError: An output is no modality, or shipped weights do not exist.
    """
    for output in spec.outputs:
        modalities.get(output)
    return Stage(
        name=f"label:{spec.name}",
        version=VERSION,
        params={"options": spec.options, "precision": spec.precision},
        outputs=spec.outputs,
        upstream=(fetch,),
        model=spec.model_id,
        revision=weights_revision(spec),
    )


def label_jobs(
    specs: Iterable[LabelerSpec], fetch: Stage, shards: Iterable[int]
) -> list[StageJob]:
    """Return one job for the stage runner for each labeler, over the given shards."""
    chosen = tuple(shards)
    return [
        StageJob(
            stage=label_stage(spec, fetch),
            factory="tasks.label:build_work",
            config=spec.to_dict(),
            shards=chosen,
        )
        for spec in specs
    ]


def build_work(store_url: str, stage: Stage, config: dict[str, Any]) -> LabelWork:
    """Build the worker's side of `label_jobs`: load the network.

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

    def run(self, shard: int) -> ShardData:
        """Label the pictures of a shard.

        Raises:
            RuntimeError: No picture of the shard could be labelled: the fault is not theirs.
        """
        started = time.monotonic()
        group = self._labeler.spec.batch_size * BATCHES_AT_ONCE
        steps = (self._decode, self._label, self._encode)
        samples: list[_Sample] = []
        for done in pipelined(_groups(self._pictures(shard), group), *steps):
            samples += done
        _refuse_if_hopeless(self._stage, shard, samples)
        return ShardData(
            keys=[sample.key for sample in samples],
            outputs={output: _tar(samples, output) for output in self._stage.outputs},
            statuses=[(sample.key, sample.reason, sample.detail) for sample in samples],
            seconds=time.monotonic() - started,
        )

    def _pictures(self, shard: int) -> Iterator[_Sample]:
        path, sha256 = self._ledger.open_output(self._fetch, shard, "rgb")
        for name, data in read_tar(path, sha256=sha256):
            key, extension = split_name(name)
            sample = _Sample(key, data)
            if extension == MISSING_EXT:
                sample.fail("no_picture", "the fetch stage left a hole")
            yield sample

    def _decode(self, samples: list[_Sample]) -> list[_Sample]:
        decode = modalities.get("rgb").decode
        for sample in samples:
            if sample.reason == "ok":
                try:
                    sample.image = decode(sample.data)
                except (OSError, ValueError, SyntaxError) as error:
                    sample.fail("undecodable", error)
            sample.data = b""
        return samples

    def _label(self, samples: list[_Sample]) -> list[_Sample]:
        ready = [sample for sample in samples if sample.image is not None]
        if not ready:
            return samples
        try:
            self._label_together(ready)
        except (RuntimeError, ValueError) as error:
            logger.warning("%s: a batch failed, one at a time: %s", self._stage.id, error)
            for sample in ready:
                self._label_alone(sample)
        return samples

    def _label_together(self, samples: list[_Sample]) -> None:
        images = [cast(np.ndarray, sample.image) for sample in samples]
        labels = self._labeler.label(images)
        for number, sample in enumerate(samples):
            sample.values = {name: values[number] for name, values in labels.items()}

    def _label_alone(self, sample: _Sample) -> None:
        try:
            self._label_together([sample])
        except (RuntimeError, ValueError) as error:
            sample.fail("unlabelled", error)

    def _encode(self, samples: list[_Sample]) -> list[_Sample]:
        for sample in samples:
            sample.members = {
                name: modalities.get(name).encode(value) for name, value in sample.values.items()
            }
            sample.image, sample.values = None, {}
        return samples


def _groups(samples: Iterator[_Sample], size: int) -> Iterator[list[_Sample]]:
    while group := list(islice(samples, size)):
        yield group


def _refuse_if_hopeless(stage: Stage, shard: int, samples: list[_Sample]) -> None:
    reasons = Counter(sample.reason for sample in samples)
    if samples and reasons["unlabelled"] == len(samples):
        raise RuntimeError(
            f"{stage.id} labelled no picture of shard {shard}; the first: {samples[0].detail}"
        )


def _tar(samples: list[_Sample], output: str) -> bytes:
    extension = modalities.get(output).ext
    return write_tar(
        (f"{sample.key}.{extension}", sample.members[output])
        if sample.members
        else hole(sample.key, sample.reason)
        for sample in samples
    )
