"""What a training would take, without data or accelerator: shapes, memory, tokens, hours.

The network is built on the meta device, so every shape is the real one and nothing is allocated.
Bytes of a device are

    weights      4 for each parameter (fp32), over all devices when sharded
    gradients    4 for each trained parameter, likewise
    optimizer    8 for each that AdamW updates, 4 for each that Muon updates, likewise
    mean         4 for each parameter where a mean of the weights is kept, likewise
    gathered     sharded only: the largest block's weights in bf16, twice (one is prefetched), and
                 its gradients; embeddings and heads, which stay gathered in fp32 from the forward
                 to the end of the backward pass, and their gradients
    activations  `models.fourm.cost.activation_bytes` of the widest part of a batch

and exclude the allocator's slack and the communication's buffers: keep a tenth of a device free.
Low-rank training counts all embeddings as trained: which are new shows beside a checkpoint only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from models.fourm.cost import Load, activation_bytes, expected_load, train_flops, widest
from models.fourm.masking import Mixture
from models.fourm.spec import FourMConfig, ModalitySpec
from tasks.recipes import TrainRecipe
from tasks.recipes.released import SEVEN
from tasks.specs import chosen_specs, released_specs, resolve

if TYPE_CHECKING:
    from models.fourm.model import FourM
    from tasks.mixture import Bound

Parallel = Literal["ddp", "fsdp"]
CORE = ("encoder.", "decoder.", "encoder_norm.", "decoder_norm.", "decoder_proj_context.",
        "mask_token", "register_tokens")
"""Tensors that models are named after; the rest belongs to modalities."""
FP32, BF16 = 4, 2
_UPDATE = ".update"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a training would run on."""

    devices: int = 1
    parallel: Parallel = "ddp"
    """ddp: every device holds everything; fsdp: weights, gradients and optimizer are split."""
    accumulate: int = 1
    """Parts of a device's share of a batch that it takes one after another."""
    recompute: bool = False
    """Activation checkpointing of every block."""
    peak_tflops: float = 312.0
    """bf16 peak of a device in TFLOP/s, A100 by default (H100: 989)."""
    mfu: float = 0.4
    """Share of the peak that is reached."""
    memory_gib: float = 80.0
    """Memory of a device."""

    def __post_init__(self) -> None:
        for name in ("devices", "accumulate", "peak_tflops", "memory_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is a share of the peak in (0, 1], got {self.mfu}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    mean: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class TrainPlan:
    """What `plan_training` found."""

    config: FourMConfig
    recipe: TrainRecipe
    machines: Machines
    parameters: int
    core: int
    """Parameters of the blocks, without embeddings of modalities."""
    trained: int
    tensors: dict[str, tuple[int, ...]]
    """Shape of every parameter."""
    load: Load
    """Slots of a sample, the mean over all sources."""
    micro_batch: int
    """Samples that a device takes at once."""
    memory: Memory
    flops_per_step: float

    @property
    def tokens(self) -> float:
        """Input and target slots of the whole run."""
        training = self.recipe.training
        return training.steps * training.batch_size * self.load.tokens

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        return self.recipe.training.steps * self.flops_per_step

    @property
    def hours(self) -> float:
        """Time of the whole run."""
        machines = self.machines
        pace = machines.devices * machines.peak_tflops * 1e12 * machines.mfu
        return self.flops / pace / 3600

    @property
    def fits(self) -> bool:
        """Whether nine tenths of a device's memory suffice."""
        return self.memory.total <= 0.9 * self.machines.memory_gib * GIB


def plan_training(
    recipe: TrainRecipe, machines: Machines, bound: Sequence[Bound] = ()
) -> TrainPlan:
    """Checks a recipe and states its cost; seconds on any machine.

    Args:
        recipe: The recipe.
        machines: What it would run on.
        bound: The manifests of its sources; without them modalities are those of the released
            models, and a recipe that takes whatever the data holds is given the ones of 4M-7 and
            those that its masks name.

    Raises:
        ValueError: a set lacks a modality, no batch can fill a budget, or the batch cannot be
            divided; with names and numbers.
    """
    config, parts = _resolved(recipe, bound)
    micro = _micro_batch(recipe, machines)
    tensors = _shapes(config)
    sizes = {name: _count(shape) for name, shape in tensors.items()}
    sizes |= _updates(recipe, tensors)
    trained = {name: size for name, size in sizes.items() if not _is_frozen(recipe, name)}
    loads, (inputs, targets) = _loads(config, parts)
    load = _mean(loads)
    return TrainPlan(
        config, recipe, machines, sum(sizes.values()),
        sum(size for name, size in sizes.items() if name.startswith(CORE)),
        sum(trained.values()), tensors, load, micro,
        _memory(recipe, machines, sizes, trained,
                micro * activation_bytes(
                    config, replace(load, inputs=inputs, targets=targets), compute_bytes=BF16,
                    recompute=machines.recompute)),
        recipe.training.batch_size
        * sum(share * train_flops(config, part) for share, part in loads),
    )


def _loads(
    config: FourMConfig, parts: Sequence[tuple[float, Mixture]]
) -> tuple[list[tuple[float, Load]], tuple[float, float]]:
    """(Share, load) of every source, and input and target slots of the widest batch. Where
    samples of several sources share a batch, all are as wide as the widest."""
    total = sum(weight for weight, _ in parts)
    loads = [(weight / total, expected_load(config, mixture)) for weight, mixture in parts]
    most = [widest(mixture) for _, mixture in parts]
    inputs, targets = (float(max(one[kind] for one in most)) for kind in (0, 1))
    if not parts[0][1].per_batch:
        loads = [(share, replace(load, inputs=inputs, targets=targets)) for share, load in loads]
    return loads, (inputs, targets)


def _resolved(
    recipe: TrainRecipe, bound: Sequence[Bound]
) -> tuple[FourMConfig, list[tuple[float, Mixture]]]:
    """The network, and (weight, masks) of every source."""
    if bound:
        from tasks.mixture import shared_specs

        config = FourMConfig(modalities=shared_specs(bound), **recipe.network)
        names = [part.names for part in bound]
    else:
        offered = released_specs(
            recipe.modalities or list(dict.fromkeys([*SEVEN, *_named(recipe)]))
        )
        specs = chosen_specs(offered, (), recipe.predicts, "the catalogue")
        config = FourMConfig(modalities=specs, **recipe.network)
        names = [frozenset(s.name for s in _taken(specs, source.modalities))
                 for source in recipe.all_sources]
    return config, [(source.weight, resolve(source.mixture, config, held))
                    for source, held in zip(recipe.all_sources, names, strict=True)]


def _named(recipe: TrainRecipe) -> list[str]:
    """Modalities that its masks name."""
    return [name for source in recipe.all_sources for part in source.mixture.components
            for name in (*part.inputs, *part.targets) if name != "*"]  # fmt: skip


def _taken(specs: Sequence[ModalitySpec], wanted: Sequence[str]) -> Sequence[ModalitySpec]:
    return chosen_specs(specs, wanted, (), "the recipe")


def _micro_batch(recipe: TrainRecipe, machines: Machines) -> int:
    batch, parts = recipe.training.batch_size, machines.devices * machines.accumulate
    if batch % parts:
        raise ValueError(f"batch_size {batch} is no multiple of {machines.devices} devices x "
                         f"{machines.accumulate} accumulated parts")
    return batch // parts


def meta_model(config: FourMConfig) -> FourM:
    """The network with shapes and no values."""
    import torch

    from models.fourm.model import FourM

    with torch.device("meta"):
        return FourM(config)


def _shapes(config: FourMConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _is_frozen(recipe: TrainRecipe, name: str) -> bool:
    """Whether a parameter is not updated; tables that are frozen in part count as trained."""
    if recipe.lora and name.startswith(CORE):
        return not name.endswith(_UPDATE)
    return any(fnmatchcase(name, pattern) for pattern in recipe.freeze)


def _updates(recipe: TrainRecipe, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the low-rank updates, both factors together."""
    if not recipe.lora:
        return {}
    layers = {name.removesuffix(".weight"): shape for name, shape in tensors.items()}
    return {name + _UPDATE: recipe.lora.rank * sum(shape) for name, shape in layers.items()
            if len(shape) == 2 and re.fullmatch(recipe.lora.modules, name)}


def _mean(loads: Sequence[tuple[float, Load]]) -> Load:
    """The load of an average sample."""
    rows: dict[str, float] = {}
    dense: dict[str, float] = {}
    for share, load in loads:
        for into, values in ((rows, load.rows), (dense, load.dense)):
            for name, count in values.items():
                into[name] = into.get(name, 0.0) + share * count
    return Load(sum(share * load.inputs for share, load in loads),
                sum(share * load.targets for share, load in loads), rows, dense)


def _memory(
    recipe: TrainRecipe, machines: Machines, sizes: dict[str, int], trained: dict[str, int],
    activations: float,
) -> Memory:
    split = machines.devices if machines.parallel == "fsdp" else 1
    muon = sum(size for name, size in trained.items()
               if recipe.muon and name.startswith(("encoder.", "decoder.")))
    count = sum(trained.values())
    gathered = 0.0
    if machines.parallel == "fsdp":
        blocks, learned = _blocks(sizes), _blocks(trained)
        outside = blocks.pop("", 0) + learned.get("", 0)
        gathered = (2.0 * BF16 + FP32) * max(blocks.values()) + FP32 * outside
    return Memory(
        weights=FP32 * sum(sizes.values()) / split,
        gradients=FP32 * count / split,
        optimizer=FP32 * (2 * (count - muon) + muon) / split,
        mean=FP32 * sum(sizes.values()) / split if recipe.training.ema_decay else 0.0,
        gathered=gathered,
        activations=activations,
    )


def _blocks(sizes: dict[str, int]) -> dict[str, int]:
    """Parameters of each unit that is gathered at once: a block, or all that is outside."""
    found: dict[str, int] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        unit = ".".join(parts[:2]) if parts[0] in ("encoder", "decoder") else ""
        found[unit] = found.get(unit, 0) + size
    return found


def plan_lines(plan: TrainPlan) -> Iterator[str]:
    """The plan for a terminal."""
    training, machines, memory = plan.recipe.training, plan.machines, plan.memory
    yield "modalities"
    for spec in plan.config.modalities:
        use = " ".join(word for word, on in (("in", spec.is_input), ("out", spec.is_target)) if on)
        size = f"vocabulary {spec.vocab_size}" if spec.discrete else f"width {spec.dense_width}"
        yield f"  {spec.name:24} {spec.kind:8} {spec.max_tokens:4} tokens, {size}, {use}"
    yield "parameters"
    yield from (f"  {line}" for line in _table(plan.tensors))
    yield f"  without embeddings {plan.core:,}; with embeddings {plan.parameters:,}"
    if plan.trained != plan.parameters:
        yield f"  trained {plan.trained:,}"
    yield (f"memory of a device, {machines.devices} x {machines.parallel}, {plan.micro_batch} "
           f"samples at once{', recomputing blocks' if machines.recompute else ''}")
    for name, size in vars(memory).items():
        yield f"  {name:12} {size / GIB:8.2f} GiB"
    verdict = "fits" if plan.fits else "does not fit"
    yield (f"  {'total':12} {memory.total / GIB:8.2f} GiB: {verdict} in {machines.memory_gib:g} "
           "GiB with a tenth left free")
    yield "run"
    yield (f"  {training.steps:,} steps of {training.batch_size:,} samples, "
           f"{plan.load.inputs:.0f} + {plan.load.targets:.0f} tokens each: "
           f"{plan.tokens / 1e9:.3g} B tokens")
    yield f"  {plan.flops_per_step:.3g} FLOP a step, {plan.flops:.3g} FLOP in all"
    yield (f"  {plan.hours:,.1f} hours on {machines.devices} devices of {machines.peak_tflops:g} "
           f"TFLOP/s at {machines.mfu:.0%} utilisation: {plan.hours * machines.devices:,.0f} "
           "device hours")


def _table(tensors: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Shapes, blocks of a kind as one line for each of their tensors."""
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in tensors.items():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoder"):
            parts[1] = "*"
        key = ".".join(parts), shape
        groups[key] = groups.get(key, 0) + 1
    for (name, shape), count in groups.items():
        times = f"{count} x " if count > 1 else ""
        yield f"{name:36} {times}{' x '.join(map(str, shape))}"
