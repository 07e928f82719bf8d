"""What a recipe of a 4M training consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.fourm.masking import Mixture
from tasks.train_config import FREE, TrainConfig

MAIN = "main"
"""Name of the source of a recipe that lists none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the token sets that a training mixes."""

    name: str
    """What `fourm train --data` and `Phase` call it."""
    weight: float
    """Share of samples, relative to the other sources."""
    mixture: Mixture
    """Masks of its samples, as in `TrainRecipe.mixture`."""
    modalities: tuple[str, ...] = ()
    """Modalities taken from it; none: all of the recipe's that it holds."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"source {self.name}: weight must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of a curriculum: weights that hold from a share of the run on. What it does not name
    stays as it was."""

    since: float
    """Where it begins, as a share of `TrainConfig.steps`, 0..1."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """New weights of sources; 0 leaves one out."""
    components: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Source -> new weights of all components of its mixture, 0 leaves one out. The source of a
    recipe that lists none is "main"."""

    def __post_init__(self) -> None:
        if not 0 <= self.since < 1:
            raise ValueError(f"a phase begins at a share of the run in [0, 1), got {self.since}")
        for name, weight in self.sources.items():
            if weight < 0:
                raise ValueError(f"phase at {self.since}: weight of {name} is negative: {weight}")
        for name, weights in self.components.items():
            if not weights or min(weights) < 0 or max(weights) <= 0:
                raise ValueError(f"phase at {self.since}: weights of the components of {name} must "
                                 f"not be negative nor all 0, got {list(weights)}")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates of the blocks' matrices (Hu et al. 2022) in place of the matrices."""

    rank: int = 16
    """Rank of each update."""
    alpha: int = 32
    """Scale of an update times the rank."""
    dropout: float = 0.0
    """Share of a matrix' inputs that its update does not see in training."""
    modules: str = r"(encoder|decoder)\.\d+\..+\.(qkv|q|kv|proj|fc1|fc2|fc3)"
    """Regular expression of the layers that get one."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Everything that decides on a training but the data."""

    network: Mapping[str, Any]
    """Settings of `FourMConfig` other than its modalities."""
    mixture: Mixture
    """Masks by names of modalities, with or without resolution; "*" is every other one."""
    training: TrainConfig
    max_text: int = 256
    """Longest caption or box list in tokens."""
    muon: bool = False
    """Whether Muon updates the matrices of the blocks."""
    val_samples: int = 128
    """Samples of the validation split that losses are measured on, of each source."""
    modalities: tuple[str, ...] = ()
    """Modalities the model has, all of which the data must hold; none: all that it holds, at the
    set's own size where it has several."""
    predicts: tuple[str, ...] = ()
    """Modalities the decoder predicts; none: all that are tokens."""
    sources: tuple[Source, ...] = ()
    """Token sets to mix; none: one set with the masks of `mixture`."""
    phases: tuple[Phase, ...] = ()
    """Curriculum, in the order of time."""
    repeats: int = 1
    """Steps that mask the same loaded samples anew, before others are loaded."""
    starts_from: str = ""
    """Recipe whose finished model this one begins with; empty: fresh weights."""
    start: str = ""
    """The checkpoint to begin with: a run of this store, a folder, or a name on the hub."""
    inherit: Mapping[str, str] = field(default_factory=dict)
    """New modality -> modality of `start` whose token vectors it takes, where they share codes."""
    freeze: tuple[str, ...] = ()
    """Patterns of published parameter names that stay as they are: "encoder.*", "*.caption.*"."""
    lora: Lora | None = None
    """Train low-rank updates and the embeddings of new modalities only."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources must have different names, got {', '.join(names)}")
        since = [phase.since for phase in self.phases]
        if since != sorted(since):
            raise ValueError(f"phases must be in the order of time, got {since}")
        self._check_phases()

    def _check_phases(self) -> None:
        sizes = {source.name: len(source.mixture.components) for source in self.all_sources}
        training = self.training
        # Batches are as wide as one of the components at least.
        narrow = min(part.num_inputs[1] + part.num_targets[1]
                     for source in self.all_sources for part in source.mixture.components)
        end = -(-training.tokens // (training.batch_size * narrow))
        for phase in self.phases:
            if training.tokens and phase.since * training.steps >= end:
                raise ValueError(f"the phase at {phase.since} of {training.steps} steps never "
                                 f"begins: {training.tokens} tokens are spent after {end} steps")
            odd = sorted((phase.sources.keys() | phase.components.keys()) - sizes.keys())
            if odd:
                raise ValueError(f"the phase at {phase.since} names {', '.join(odd)}; the sources "
                                 f"are {', '.join(sizes)}")
            for name, weights in phase.components.items():
                if len(weights) != sizes[name]:
                    raise ValueError(f"the phase at {phase.since} has {len(weights)} weights for "
                                     f"the {sizes[name]} components of {name}")

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The sources, also where there is only one without a name of its own."""
        return self.sources or (Source(name=MAIN, weight=1.0, mixture=self.mixture),)


# What describes a run since the first version. A field that was added later counts only where it
# is not at its default, so that a new release finds finished runs under their old names.
_FIRST = {
    "TrainRecipe": {"network", "mixture", "training", "max_text", "muon", "val_samples"},
    "Mixture": {"components", "per_batch"},
    "Component": {"inputs", "targets", "num_inputs", "num_targets", "weight", "keep"},
    "TrainConfig": {"steps", "batch_size", "lr", "min_lr_ratio", "warmup_steps", "schedule",
                    "weight_decay", "betas", "clip_norm", "precision", "seed",
                    "checkpoint_seconds", "log_every", "eval_every", "threads"},
}


def described(value: Any) -> Any:
    """A recipe, or a part of one, as JSON values: what identifies a run. How it is computed, on how
    much hardware, does not."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        first = _FIRST.get(type(value).__name__)
        return {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)
                if first is None or f.name in first
                or (f.name not in FREE and getattr(value, f.name) != _default(f))}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return value


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default
