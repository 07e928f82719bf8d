"""The 4M encoder-decoder (Mizrahi et al. 2023; Bachmann et al. 2024).

Numerically the released model, computed token-first: only the slots a batch uses are ever embedded,
and each modality's output matrix meets only the rows of that modality. B batch, N input slots,
M target slots, D width, T loss rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fourm.attention import (
    PADDING,
    Mask,
    additive,
    attention,
    cross_attention,
    input_masks,
    key_mask,
    target_mask,
)
from models.fourm.batch import IGNORED, Batch
from models.fourm.embeddings import DenseInput, Positions, TokenTable
from models.fourm.losses import summed_losses
from models.fourm.spec import FourMConfig, ModalitySpec


@dataclass
class LayerCache:
    """Keys and values [B,H,*,Dh] of one decoder layer while generating from left to right."""

    self_kv: tuple[Tensor, Tensor] | None = None
    cross_kv: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Encoded:
    """What the decoder reads: context [B,N,D] and the mask [B,1,1,N] of its slots."""

    context: Tensor
    mask: Mask


class Norm(nn.LayerNorm):
    """LayerNorm over an fp32 residual that hands on what matrix products take under autocast."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__(dim, eps=1e-6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    """Self-attention with packed projections, [q; k; v] by heads."""

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.proj = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.q_norm, self.k_norm = _head_norms(config)

    def forward(self, x: Tensor, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = _by_head(self.qkv(x).view(b, n, 3, self.heads, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            if cache.self_kv is not None:
                k = torch.cat([cache.self_kv[0], k], 2)
                v = torch.cat([cache.self_kv[1], v], 2)
            cache.self_kv = k, v
        return self.proj(attention(q, k, v, mask).transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    """Attention of targets to the encoder's context; [k; v] packed by heads. Where a row of the
    context holds several inputs, the targets of each lie below one another in the result."""

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=config.bias)
        self.proj = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.q_norm, self.k_norm = _head_norms(config)

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        b, n, d = x.shape
        q = self.q_norm(self.q(x).view(b, n, self.heads, -1).transpose(1, 2))
        return self.proj(cross_attention(q, *keys, mask).transpose(1, 2).reshape(-1, n, d))

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,H,N,Dh] of the normalised context."""
        b, n, _ = context.shape
        k, v = _by_head(self.kv(context).view(b, n, 2, self.heads, -1))
        return self.k_norm(k), v


class Mlp(nn.Module):
    """GELU MLP, or SwiGLU: fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden, bias=config.bias)
        self.fc2 = nn.Linear(config.hidden, config.dim, bias=config.bias)
        self.fc3 = nn.Linear(config.dim, config.hidden, bias=config.bias) \
            if config.gated_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        if self.fc3 is None:
            return self.fc2(F.gelu(self.fc1(x)))
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(config.dim, config.bias), Attention(config)
        self.norm2, self.mlp = Norm(config.dim, config.bias), Mlp(config)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP."""

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.norm1, self.self_attn = Norm(config.dim, config.bias), Attention(config)
        self.query_norm, self.context_norm = (Norm(config.dim, config.bias) for _ in range(2))
        self.cross_attn = CrossAttention(config)
        self.norm2, self.mlp = Norm(config.dim, config.bias), Mlp(config)

    def forward(
        self, y: Tensor, encoded: Encoded, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        y = y + self.self_attn(self.norm1(y), mask, cache)
        if cache is not None and cache.cross_kv is not None:
            keys = cache.cross_kv
        else:
            keys = self.cross_attn.keys(self.context_norm(encoded.context))
        if cache is not None:
            cache.cross_kv = keys
        crossed = self.cross_attn(self.query_norm(y), keys, encoded.mask)
        if len(y) != len(crossed):
            y = y.repeat(len(crossed) // len(y), 1, 1)
        y = y + crossed
        return y + self.mlp(self.norm2(y))


@dataclass(frozen=True)
class Losses:
    """The loss to minimise and the mean cross-entropy of every target modality (0 without rows),
    all scalars on the device."""

    total: Tensor
    per_modality: dict[str, Tensor] = field(default_factory=dict)


class FourM(nn.Module):
    """The network. `forward(batch)` returns `Losses`; `encode`, `decode` and `logits` are its
    parts, which generation calls one by one."""

    is_grid: Tensor

    def __init__(self, config: FourMConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        specs = config.modalities
        inputs, targets = [m.is_input for m in specs], [m.is_target for m in specs]
        self.enc_tokens = TokenTable(specs, [m.is_input and m.discrete for m in specs], dim,
                                     config.token_std)
        self.heads = TokenTable(specs, targets, dim)
        self.dec_tokens = None if config.tie_embeddings else TokenTable(
            specs, [m.is_target and m.kind == "seq" for m in specs], dim, config.token_std)
        self.enc_positions = Positions(specs, inputs, dim)
        self.dec_positions = Positions(specs, targets, dim)
        self.enc_modality = nn.Parameter(torch.randn(len(specs), dim) * 0.02)
        self.dec_modality = self.enc_modality if config.share_modality_embeddings else \
            nn.Parameter(torch.randn(len(specs), dim) * 0.02)
        # Module names must not hold dots or repeat attributes: keyed by index, not by name.
        self.dense = nn.ModuleDict({str(config.index(m.name)): DenseInput(m, dim)
                                    for m in config.inputs if not m.discrete})
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_tokens = nn.Parameter(
            torch.randn(1, config.num_register_tokens, dim) * 0.02
        ) if config.num_register_tokens else None
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.encoder_norm = Norm(dim, config.bias)
        self.decoder_proj_context = nn.Linear(dim, dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = Norm(dim, config.bias)
        grid = torch.tensor([m.kind != "seq" for m in specs])
        self.register_buffer("is_grid", grid, persistent=False)
        self.apply(_init)

    def forward(self, batch: Batch) -> Losses:
        """Losses of one batch."""
        y = self.decode(self.encode(batch), batch.dec_ids, batch.dec_mod, batch.dec_pos,
                        batch.dec_until)
        return self.losses(y, batch.parts or batch.by_modality())

    def losses(self, y: Tensor, parts: tuple[Tensor, ...]) -> Losses:
        """Losses of decoder outputs [B,M,D] at the slots and targets [R,2] of every modality."""
        parts = tuple(part for spec, part in zip(self.config.modalities, parts, strict=True)
                      if spec.is_target)
        rows = y.reshape(-1, y.shape[-1]).index_select(0, torch.cat([part[:, 0] for part in parts]))
        targets = [part[:, 1] for part in parts]
        specs = self.config.targets
        sums = summed_losses(rows, self.heads.weight, targets, [m.vocab_size for m in specs])
        count = torch.stack([(part != IGNORED).sum() for part in targets])
        total = sums / count.clamp(min=1)
        per_modality = {spec.name: loss for spec, loss in zip(specs, total.unbind(), strict=True)}
        if self.config.loss != "mod":
            if self.config.loss == "token_by_vocab":
                count = count * count.new_tensor([m.vocab_size for m in specs])
            return Losses((total * count).sum() / count.sum().clamp(min=1), per_modality)
        return Losses(total.sum() / len(total), per_modality)

    def embed_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token vectors and position-plus-modality vectors, both [B,N,D], zero in unused slots."""
        used = (batch.enc_mod != PADDING).unsqueeze(2)
        modality = batch.enc_mod.clamp(min=0)
        emb = self.enc_positions(modality, batch.enc_pos) + F.embedding(modality, self.enc_modality)
        x = self.enc_tokens(modality, batch.enc_ids)
        for name, dense in batch.dense.items():
            torch._check(dense.values.shape[0] == dense.slots.shape[0])
            vectors = self.dense[str(self.config.index(name))](dense.values).to(x.dtype)
            x = x.view(-1, x.shape[2]).index_copy(0, dense.slots, vectors).view(x.shape)
        return x * used, emb * used

    def encode(self, batch: Batch) -> Encoded:
        """Runs the encoder over the inputs of `batch`."""
        x, emb, mask = self._encoded(batch)
        return Encoded(self.decoder_proj_context(x) + emb, mask)

    def features(self, batch: Batch) -> Tensor:
        """Normalised encoder output [B,R+N,D]: R register tokens, then the slots of `batch`, of
        which unused ones hold nothing of meaning."""
        return self._encoded(batch)[0]

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Mask]:
        """Normalised output, position-plus-modality vectors and mask, with register tokens."""
        x, emb = self.embed_inputs(batch)
        x = x + emb
        modality = batch.enc_mod
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([registers, x], 1)
            emb = F.pad(emb, (0, 0, registers.shape[1], 0))
            modality = F.pad(modality, (registers.shape[1], 0))
        dtype = self._dtype(x)
        mask = input_masks(modality, batch.enc_sizes, dtype) if batch.enc_sizes \
            else additive(key_mask(modality), dtype)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x), emb, mask

    def embed_targets(self, ids: Tensor, modality: Tensor, position: Tensor) -> Tensor:
        """Decoder input [B,M,D]: mask token or the preceding token, plus position and modality."""
        used = (modality != PADDING).unsqueeze(2)
        modality = modality.clamp(min=0)
        fed = (self.heads if self.dec_tokens is None else self.dec_tokens)(modality, ids)
        x = torch.where(self.is_grid[modality].unsqueeze(2), self.mask_token, fed)
        emb = self.dec_positions(modality, position) + F.embedding(modality, self.dec_modality)
        return (x + emb) * used

    def decode(
        self, encoded: Encoded, ids: Tensor, modality: Tensor, position: Tensor,
        until: Tensor | None, caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """Normalised decoder output [B,M,D]. Targets that are the same for several inputs of a row
        may be given once: until they read these, they need no rows of their own.

        `until` None lets every target slot attend all others. With `caches` (one per layer, empty
        at first) the slots given continue the cached ones, which they all attend.
        """
        y = self.embed_targets(ids, modality, position)
        mask = None
        if until is not None:
            mask = additive(target_mask(modality, until), self._dtype(y))
        for i, block in enumerate(self.decoder):
            y = block(y, encoded, mask, caches[i] if caches else None)
        return self.decoder_norm(y)

    def logits(self, y: Tensor, spec: ModalitySpec) -> Tensor:
        """Scores [..., V] of decoder outputs [..., D] for one target modality."""
        return F.linear(y, self.heads.rows(spec))

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _by_head(packed: Tensor) -> tuple[Tensor, ...]:
    """The parts [B,H,N,Dh] of [B,N,parts,H,Dh], whose gradients come together in its own layout."""
    return tuple(part.transpose(1, 2) for part in packed.unbind(2))


class _HeadNorm(nn.LayerNorm):
    """QK-norm that keeps the precision of the products around it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def _head_norms(config: FourMConfig) -> tuple[nn.Module, nn.Module]:
    if not config.qk_norm:
        return nn.Identity(), nn.Identity()
    width = config.dim // config.num_heads
    return (_HeadNorm(width, eps=1e-6, bias=config.bias),
            _HeadNorm(width, eps=1e-6, bias=config.bias))


@torch.no_grad()
def _init(module: nn.Module) -> None:
    """Xavier-uniform matrices; packed projections as if they were not packed."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, (Attention, CrossAttention)):
        packed = module.qkv if isinstance(module, Attention) else module.kv
        parts = packed.out_features // packed.in_features
        bound = math.sqrt(6 / (packed.out_features / parts + packed.in_features))
        nn.init.uniform_(packed.weight, -bound, bound)
