"""What a stage is, what its workers hand over, and the record that results."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.strict import is_of, typed

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Stage:
    """One step over all shards. Whatever changes its output is part of its fingerprint.

    Args:
        name: kind and subject, e.g. "label:depth"; "fetch" has no subject.
        version: raised by the author when the code's output changes.
        params: parameters that change the output; JSON values.
        outputs: modalities it writes.
        upstream: stages whose outputs it reads.
        model: hub id or folder of the network, "" for none.
        revision: the network's revision, "" for none.
    """

    name: str
    version: int
    params: dict[str, Any]
    outputs: tuple[str, ...]
    upstream: tuple[Stage, ...] = ()
    model: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if not self.outputs or any(c in n for n in (self.name, *self.outputs) for c in "/@\\ "):
            raise ValueError(f"stage {self.name!r}: needs outputs, and names without '/', '@', ' '")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex), equal in every process and for any order of parameters."""
        content = {
            "name": self.name,
            "version": self.version,
            "params": self.params,
            "outputs": list(self.outputs),
            "model": self.model,
            "revision": self.revision,
            "upstream": sorted(stage.fingerprint for stage in self.upstream),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def id(self) -> str:
        """Name and short fingerprint, e.g. "label:depth@1a2b3c4d"."""
        return f"{self.name}@{self.fingerprint[:8]}"

    def directory(self, output: str) -> str:
        """Folder of an output's tars, e.g. "fetch:caption@1a2b3c4d"."""
        if output not in self.outputs:
            raise ValueError(f"{self.id} writes {list(self.outputs)}, not {output!r}")
        return f"{self.name.split(':')[0]}:{output}@{self.fingerprint[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """JSON value that `from_dict` turns into an equal stage."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        upstream = [stage.to_dict() for stage in self.upstream]
        return own | {"outputs": list(self.outputs), "upstream": upstream}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Stage:
        """The stage of a `to_dict` value."""
        upstream = tuple(cls.from_dict(stage) for stage in value["upstream"])
        return cls(**value | {"outputs": tuple(value["outputs"]), "upstream": upstream})


SHARDS = "shards"
"""The place of `ShardData.queues` that counts the shards of the worker."""


@dataclass
class ShardData:
    """What a worker hands to `Ledger.commit`.

    Args:
        keys: samples of the outputs, in order; holes included, dropped samples not.
        outputs: modality -> tar.
        statuses: (key, reason, detail) of every sample of the unit, dropped ones included; the
            reason is "ok" or a class such as "404".
        seconds: wall-clock time of the work.
        info: anything else worth recording; JSON values.
        columns: further columns of the status table, a value for each status.
        waited: of these seconds those in which the work was held up, by what it waited for.
        queues: how much was at each place of the worker, on average over the seconds; at `SHARDS`
            shards, this one included, where several overlap and none has the worker for itself.
    """

    keys: list[str]
    outputs: dict[str, bytes]
    statuses: list[tuple[str, str, str]]
    seconds: float
    info: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, pa.Array] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    queues: dict[str, float] = field(default_factory=dict)


_MADE = {"path": str, "sha256": str, "bytes": int}


@dataclass(frozen=True)
class Commit:
    """The record of one shard of one stage.

    `outputs` maps a modality to {path, sha256, bytes} and `status` is the same for the Parquet of
    sample statuses; `drops` counts the statuses other than "ok" by reason; `upstream` maps
    "stage/shard" to {modality: sha256} of what was read; `waited` and `queues` are as in
    `ShardData`, and empty in commits of before there were any.
    """

    stage: str
    fingerprint: str
    shard: int
    outputs: dict[str, dict[str, Any]]
    status: dict[str, Any]
    samples: int
    key_digest: str
    drops: dict[str, int]
    seconds: float
    samples_per_second: float
    model: str
    revision: str
    code_version: str
    run_id: str
    upstream: dict[str, dict[str, str]]
    created: str
    info: dict[str, Any] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    queues: dict[str, float] = field(default_factory=dict)

    @property
    def worker_seconds(self) -> float:
        """Its share of the time of a worker in which several shards may have overlapped."""
        return self.seconds / max(self.queues.get(SHARDS, 1.0), 1.0)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Commit:
        """The commit of a JSON value. Raises ValueError when fields are missing, unknown or of
        another type."""
        commit = typed(cls, value, "not a commit")
        for made in (*commit.outputs.values(), commit.status):
            if not all(is_of(made.get(name), kind) for name, kind in _MADE.items()):
                raise ValueError(f"not a commit: it tells no {', '.join(_MADE)} of {made!r:.80}")
        return commit
