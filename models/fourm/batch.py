"""The batch: what masking picks, loaders carry and the model eats.

B samples, N input and M target slots, T rows. A slot is a triple (id, modality, position); modality
ids index `FourMConfig.modalities`, -1 marks an unused slot (id and position 0). Encoder and decoder
slots are ordered by modality, then position.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from models.fourm.spec import FourMConfig, ModalitySpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""Target of a row that carries no loss."""
SHAPES = 32
"""Rows of a modality in the loss are padded to one of about so many numbers: CPU kernels are
compiled and cached for each shape, and a new shape at every step costs time and memory without
end."""


@dataclass(frozen=True)
class Dense:
    """Inputs of one modality that are vectors: values [T, C] (patches uint8 or float, features
    float) and the flat slots [T] in B*N where they go."""

    values: Tensor
    slots: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Dense:
        """The same on `device`."""
        return Dense(*(_varying(getattr(self, f.name).to(device, non_blocking=non_blocking))
                       for f in fields(self)))


@dataclass(frozen=True)
class Batch:
    """One static batch. `counts` are host integers, so the loss needs no device synchronisation."""

    enc_ids: Tensor
    """[B,N] int64; 0 for pixels and feature vectors."""
    enc_mod: Tensor
    """[B,N] int64."""
    enc_pos: Tensor
    """[B,N] int64 row of the modality's position table."""
    dec_ids: Tensor
    """[B,M] int64 token a sequence slot is fed; 0 for grids, which are fed the mask token."""
    dec_mod: Tensor
    dec_pos: Tensor
    dec_until: Tensor
    """[B,M] int64: slot i attends slots of its modality before dec_until[i]."""
    rows: Tensor
    """[T] int64 flat slots in B*M that carry a loss, sorted by modality."""
    targets: Tensor
    """[T] int64 ids to predict in these slots."""
    counts: tuple[int, ...]
    """Rows per modality, in the order of `FourMConfig.modalities`."""
    dense: dict[str, Dense] = field(default_factory=dict)
    enc_sizes: tuple[int, ...] = ()
    """Slots of each input where a row holds several of them behind one another; a slot attends
    those of its own input alone."""
    parts: tuple[Tensor, ...] = ()
    """Set by `to` to what `by_modality` returns, so that a compiled network reads no `counts`."""

    def by_modality(self) -> tuple[Tensor, ...]:
        """Slots and targets [R,2] of each modality, padded to one of `SHAPES` lengths with slot 0
        and target `IGNORED`."""
        import torch
        from torch.nn.functional import pad

        parts, even = [], max(16, 1 << max(0, self.dec_mod.numel() // SHAPES - 1).bit_length())
        for slots, ids in zip(self.rows.split(self.counts), self.targets.split(self.counts),
                              strict=True):
            missing = -len(slots) % even
            parts.append(torch.stack([pad(slots, (0, missing)),
                                      pad(ids, (0, missing), value=IGNORED)], 1))
        return tuple(parts)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same on `device`."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.name not in ("counts", "dense", "enc_sizes", "parts")
        }
        dense = {k: v.to(device, non_blocking) for k, v in self.dense.items()}
        parts = tuple(_varying(part) for part in replace(self, **moved).by_modality())
        return replace(self, **moved, dense=dense, parts=parts)


def _varying(value: Tensor) -> Tensor:
    """Tells torch.compile, where it is in use, that `value` has another length at every step: else
    it would compile anew for each, and for 0 once more."""
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.decorators import mark_unbacked

        # Empty arrays come from NumPy with strides of 0, which would be another layout.
        value = value if len(value) else value.new_zeros(value.shape)
        mark_unbacked(value, 0)
    return value


def loss_rows(dec_mod: np.ndarray, num_modalities: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Flat slots of used targets sorted by modality, and how many each modality has."""
    # NumPy sorts small integers by radix.
    flat = dec_mod.reshape(-1).astype(np.int16)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat + 1, minlength=num_modalities + 1)
    return order[counts[0] :], tuple(int(c) for c in counts[1:])


def patchify(images: np.ndarray, patch: int) -> np.ndarray:
    """Images [B,H,W,C] to patches [B, (H/patch)*(W/patch), patch*patch*C], row-major."""
    b, h, w, c = images.shape
    grid = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def from_released(
    mod_dict: dict[str, dict[str, Any]], config: FourMConfig, num_inputs: int, num_targets: int
) -> Batch:
    """Converts the released per-modality dictionaries of tensors to a `Batch`.

    `mod_dict[name]` holds tensor, input_mask, target_mask (True = not used) and
    decoder_attention_mask as described in the released data format; the first `num_inputs` visible
    and `num_targets` target slots are kept, modalities in alphabetical order.
    """
    import torch

    arrays = {name: {key: np.asarray(value) for key, value in entry.items()}
              for name, entry in mod_dict.items()}
    enc = _gather([_inputs(config, config.by_name[n], arrays[n]) for n in sorted(arrays)
                   if config.by_name[n].is_input], num_inputs)
    dec = _gather([_targets(config, config.by_name[n], arrays[n]) for n in sorted(arrays)
                   if config.by_name[n].is_target], num_targets)
    rows, counts = loss_rows(dec["mod"], len(config.modalities))
    until = np.cumsum(dec["step"], 1)
    dense = {}
    for spec in config.inputs:
        if spec.discrete or spec.name not in arrays:
            continue
        values = arrays[spec.name]["tensor"]
        if spec.kind == "pixels":
            values = patchify(values.transpose(0, 2, 3, 1), spec.patch_size)
        sample, slot = np.nonzero(enc["mod"] == config.index(spec.name))
        picked = values[sample, enc["source"][sample, slot]]
        dense[spec.name] = Dense(torch.from_numpy(picked),
                                 torch.from_numpy(sample * num_inputs + slot))
    tensor = torch.from_numpy
    return Batch(
        tensor(enc["ids"]), tensor(enc["mod"]), tensor(enc["pos"]), tensor(dec["ids"]),
        tensor(dec["mod"]), tensor(dec["pos"]), tensor(until), tensor(rows),
        tensor(dec["target"].reshape(-1)[rows]), counts, dense,
    )


def _counted(mask: np.ndarray) -> np.ndarray:
    """Positions counted over used slots; unused ones get 0."""
    return np.where(mask, 0, np.cumsum(~mask, 1) - 1)


def _inputs(config: FourMConfig, spec: ModalitySpec, entry: dict[str, np.ndarray]) -> dict:
    mask = entry["input_mask"]
    source = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    grid = spec.kind in ("img", "pixels")
    ids = entry["tensor"].astype(np.int64) if spec.discrete else np.zeros(mask.shape, np.int64)
    return {"mask": mask, "ids": ids, "pos": source if grid else _counted(mask),
            "mod": np.full(mask.shape, config.index(spec.name)), "source": source}


def _targets(config: FourMConfig, spec: ModalitySpec, entry: dict[str, np.ndarray]) -> dict:
    ids, mask = entry["tensor"].astype(np.int64), entry["target_mask"]
    step = entry["decoder_attention_mask"].astype(np.int64)
    if spec.kind == "img":
        position = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
        fed, target = np.zeros_like(ids), ids
    else:
        position = _counted(mask)
        position = np.where(position >= spec.position_limit, 0, position)[:, :-1]
        fed, target, step = ids[:, :-1], ids[:, 1:], step[:, :-1]
        mask = mask[:, :-1] | mask[:, 1:]
    return {"mask": mask, "ids": fed, "pos": position, "target": target, "step": step,
            "mod": np.full(mask.shape, config.index(spec.name))}


def _gather(parts: list[dict], num: int) -> dict[str, np.ndarray]:
    """Concatenates modalities and keeps the first `num` used slots of each sample."""
    joined = {key: np.concatenate([part[key] for part in parts], 1) for key in parts[0]}
    if joined["mask"].shape[1] < num:
        missing = ((0, 0), (0, num - joined["mask"].shape[1]))
        joined = {key: np.pad(value, missing, constant_values=key == "mask")
                  for key, value in joined.items()}
    order = np.argsort(joined["mask"], axis=1, kind="stable")[:, :num]
    picked = {key: np.take_along_axis(value, order, 1) for key, value in joined.items()}
    unused = picked.pop("mask")
    return {key: np.where(unused, -1 if key == "mod" else 0, value)
            for key, value in picked.items()}
