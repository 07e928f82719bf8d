"""Tokens to vectors: every slot costs one row, whatever number of modalities there is.

The tables of all modalities lie behind one another, so that (id, modality, position) triples of a
mixed sequence are looked up with one gather each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fourm.spec import ModalitySpec

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sincos_1d(rows: int, dim: int) -> Tensor:
    """Table [rows, dim] = [sin(n w), cos(n w)], w_k = 10000^(-k / (dim / 2))."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_2d(rows: int, dim: int, columns: int | None = None) -> Tensor:
    """Table [rows * columns, dim] for row-major positions: row angles, then column angles. A grid
    is square unless `columns` says otherwise."""
    columns = columns or rows
    axis = sincos_1d(max(rows, columns), dim // 2)
    index = torch.arange(rows * columns)
    return torch.cat([axis[index // columns], axis[index % columns]], 1)


def position_table(spec: ModalitySpec, dim: int) -> Tensor:
    """The fixed position table [rows, dim] of a modality."""
    if spec.kind in ("img", "pixels") and spec.grid**2 == spec.max_tokens:
        return sincos_2d(spec.grid, dim)
    return sincos_1d(spec.position_rows, dim)


def offsets(sizes: Sequence[int]) -> list[int]:
    """Start of each table when tables of these sizes lie behind one another."""
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


class Positions(nn.Module):
    """Position vectors of all modalities; learned rows, where there are any, follow fixed ones."""

    fixed: Tensor
    start: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], used: Sequence[bool], dim: int) -> None:
        super().__init__()
        fixed = [s for s, u in zip(specs, used, strict=True) if u and not s.learned_positions]
        learned = [s for s, u in zip(specs, used, strict=True) if u and s.learned_positions]
        tables = [position_table(spec, dim) for spec in fixed]
        self.register_buffer(
            "fixed", torch.cat(tables) if tables else torch.zeros(0, dim), persistent=False
        )
        rows = sum(spec.position_rows for spec in learned)
        self.learned = nn.Parameter(torch.randn(rows, dim) * 0.02) if learned else None
        order = fixed + learned
        starts = dict(zip([s.name for s in order], offsets([s.position_rows for s in order]),
                          strict=False))
        self.starts = starts
        self.register_buffer(
            "start", torch.tensor([starts.get(s.name, 0) for s in specs]), persistent=False
        )

    def forward(self, modality: Tensor, position: Tensor) -> Tensor:
        """Vectors [..., D] of slots whose modality is not padding."""
        table = self.fixed if self.learned is None else torch.cat([self.fixed, self.learned])
        return table[self.start[modality] + position]

    def rows(self, spec: ModalitySpec) -> Tensor:
        """The table of one modality [rows, D], a view."""
        start = self.starts[spec.name]
        if spec.learned_positions:
            assert self.learned is not None
            start -= len(self.fixed)
            return self.learned[start : start + spec.position_rows]
        return self.fixed[start : start + spec.position_rows]


class TokenTable(nn.Module):
    """One matrix [sum of vocabularies, D] over several discrete modalities."""

    start: Tensor
    collected: list[tuple[Tensor, Tensor]] | None = None
    """Where it is a list, look-ups leave their gradients there, (rows [n], vectors [n, D]), instead
    of filling a matrix of zeros with them: for trainings that add them up themselves."""

    def __init__(
        self, specs: Sequence[ModalitySpec], used: Sequence[bool], dim: int, std: float = 0.02
    ) -> None:
        super().__init__()
        chosen = [s for s, u in zip(specs, used, strict=True) if u]
        starts = offsets([s.vocab_size for s in chosen])
        self.starts = dict(zip([s.name for s in chosen], starts, strict=False))
        total = sum(s.vocab_size for s in chosen)
        self.weight = nn.Parameter(torch.randn(max(total, 1), dim) * std)
        self.register_buffer(
            "start", torch.tensor([self.starts.get(s.name, 0) for s in specs]), persistent=False
        )

    def forward(self, modality: Tensor, ids: Tensor) -> Tensor:
        """Rows [..., D]; slots of modalities without a table read some row of no meaning."""
        rows = self.start[modality] + ids
        if self.collected is None or torch.compiler.is_compiling():
            return nn.functional.embedding(rows, self.weight)
        return _Collected.apply(self.weight, rows, self.collected)

    def rows(self, spec: ModalitySpec) -> Tensor:
        """The matrix [V, D] of one modality, a view."""
        start = self.starts[spec.name]
        return self.weight[start : start + spec.vocab_size]


class _Collected(torch.autograd.Function):
    """A look-up whose gradient goes to a list."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, rows: Tensor, collected: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.collected = collected
        return nn.functional.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.collected.append((rows.flatten(), grad.reshape(-1, grad.shape[-1])))
        return None, None, None


class DenseInput(nn.Module):
    """Projects patches of pixels or feature vectors [T, C] to [T, D]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: ModalitySpec, dim: int) -> None:
        super().__init__()
        self.pixels = spec.kind == "pixels"
        self.proj = nn.Linear(spec.dense_width, dim, bias=not self.pixels)
        if self.pixels:
            area = spec.patch_size**2
            colour = spec.channels == 3
            mean = torch.tensor(IMAGE_MEAN if colour else [0.5] * spec.channels)
            std = torch.tensor(IMAGE_STD if colour else [0.5] * spec.channels)
            self.register_buffer("scale", (1 / (255 * std)).repeat(area), persistent=False)
            self.register_buffer("shift", (-mean / std).repeat(area), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """uint8 patches are normalised with ImageNet's mean and deviation, floats taken as is."""
        if values.dtype == torch.uint8:
            values = values * self.scale + self.shift
        return self.proj(values)
