"""The encoder alone: embeddings of any set of modalities, and a ViT over pictures.

    found = embed(model, {"rgb@224": pictures, "tok_depth@224": ids})
    found["rgb@224"].tokens            # [B, 196, D]
    pool(found)                        # [B, D], say for retrieval

    vit = Backbone.of(model)
    vit.forward_features(pictures)     # [B, rows * columns, D] at any size

B samples, L positions of a modality, D width. Importing `models.fourm.timm_models` gives the ViT
to timm's `create_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.fourm.conditions import Shown, gather_inputs
from models.fourm.embeddings import DenseInput, position_table, sincos_2d
from models.fourm.model import EncoderBlock, FourM, Norm
from models.fourm.spec import PAD_ID, FourMConfig, ModalitySpec


@dataclass(frozen=True)
class Embedded:
    """The encoder's normalised output for one modality.

    Attributes:
        tokens: [B, L, D], one vector a position; 0 where it was not visible.
        visible: bool [B, L].
    """

    tokens: Tensor
    visible: Tensor


def patches(pictures: Tensor, patch: int, channels: int = 0) -> Tensor:
    """Pictures [B, C, H, W] as patches [B, (H/patch)*(W/patch), patch*patch*C], row-major.

    Raises:
        ValueError: no pictures, other than uint8 or floats, of other than `channels` channels (0
            allows any), or a side is no multiple of the patch.
    """
    known = pictures.dtype == torch.uint8 or pictures.is_floating_point()
    if pictures.ndim != 4 or not known or pictures.shape[1] != (channels or pictures.shape[1]):
        raise ValueError(f"pictures are uint8 or normalised floats [B, {channels or 'C'}, H, W], "
                         f"not {pictures.dtype} {list(pictures.shape)}")
    b, c, height, width = pictures.shape
    if height % patch or width % patch:
        raise ValueError(f"pictures of {height} x {width} do not divide into patches of {patch}")
    grid = pictures.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def embed(model: FourM, inputs: Mapping[str, Tensor | Shown]) -> dict[str, Embedded]:
    """What the encoder makes of any of its modalities together; each token attends all others.

    Args:
        model: In evaluation mode; gradients flow unless the caller switches them off.
        inputs: By the model's names: pictures [B, C, H, W] (uint8, or floats normalised with
            ImageNet's mean and deviation) at the model's size, token ids [B, L] of grids, ids of
            texts padded with 0, vectors [B, L, C]; or a `Shown`, whose `visible` picks positions.

    Raises:
        ValueError: a modality that is no input, values of another size, unequal batches, nothing.
    """
    shown = {name: value if isinstance(value, Shown) else _shown(_input(model.config, name), value)
             for name, value in inputs.items()}
    sizes = {name: part.visible.shape[0] for name, part in shown.items()}
    if not sizes or len(set(sizes.values())) > 1:
        raise ValueError(f"inputs must be given for one batch of samples, not for {sizes}")
    for name, part in shown.items():
        spec, length = _input(model.config, name), part.visible.shape[1]
        grid = spec.kind in ("img", "pixels")
        if length > spec.max_tokens or (grid and length != spec.max_tokens):
            hint = "; `Backbone` takes any size" if spec.kind == "pixels" else ""
            raise ValueError(f"{name} has {length} positions, the model's {spec.max_tokens}{hint}")
        # The tables of all modalities lie behind one another: ids beyond its own are another's.
        ids = part.values[part.visible] if spec.discrete else torch.empty(0)
        if ids.numel() and not 0 <= ids.min() <= ids.max() < spec.vocab_size:
            raise ValueError(f"ids of {name} lie in 0..{spec.vocab_size - 1}, not "
                             f"{int(ids.min())}..{int(ids.max())}")
    batch = gather_inputs(model.config, shown)
    features = model.features(batch)[:, model.config.num_register_tokens :]
    found = {}
    for name, part in shown.items():
        tokens = features.new_zeros((*part.visible.shape, features.shape[-1]))
        # Both sides in order of sample, then position.
        tokens = tokens.index_put((part.visible,),
                                  features[batch.enc_mod == model.config.index(name)])
        found[name] = Embedded(tokens, part.visible)
    return found


def pool(found: Mapping[str, Embedded]) -> Tensor:
    """Mean vector [B, D] over all visible positions of all modalities; 0 where there are none."""
    total = torch.stack([part.tokens.sum(1) for part in found.values()]).sum(0)
    count = torch.stack([part.visible.sum(1) for part in found.values()]).sum(0)
    return total / count.clamp(min=1).unsqueeze(1)


def _input(config: FourMConfig, name: str) -> ModalitySpec:
    spec = config.modalities[config.index(name)]
    if not spec.is_input:
        choices = ", ".join(m.name for m in config.inputs)
        raise ValueError(f"{name} is no input of this model; choose from {choices}")
    return spec


def _shown(spec: ModalitySpec, value: Tensor) -> Shown:
    values = patches(value, spec.patch_size, spec.channels) if spec.kind == "pixels" else value
    if spec.discrete and (values.ndim != 2 or values.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"{spec.name} takes token ids int64 [B, L], not "
                         f"{values.dtype} {list(values.shape)}")
    visible = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    return Shown(values, values != PAD_ID if spec.kind == "seq" else visible)


class Backbone(nn.Module):
    """The encoder as a ViT: patches of a picture, no masks, fixed positions of any grid.

    Released models are used so (`FMViT`): projected patches, position and modality vectors, all
    blocks, the encoder's norm. For a grid other than the model's the sine-cosine table is made
    anew, not interpolated. The methods are those that timm expects of a model.
    """

    modality: nn.Parameter
    positions: Tensor
    drop_rate = 0.0
    """Share of features that training hides from the head."""
    drop_path_rate = 0.0
    """Share of pictures that training takes past the last block; past others fewer, in proportion
    to their depth, and past the first none (stochastic depth, Huang et al. 2016)."""

    def __init__(
        self, config: FourMConfig, name: str | None = None, *, num_classes: int = 0,
        global_pool: str = "avg",
    ) -> None:
        """
        Args:
            config: Network; targets and decoder are ignored.
            name: The modality of pictures, by default the first one of pixels.
            num_classes: Outputs of a linear head; 0 returns pooled features.
            global_pool: "avg", or "" for no pooling.

        Raises:
            ValueError: no such modality of pixels.
        """
        super().__init__()
        self.spec = pixels_of(config, name)
        self.config = encoder_config(config, self.spec)
        dim = config.dim
        self.patches = DenseInput(self.spec, dim)
        self.modality = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        count = config.num_register_tokens
        self.registers = nn.Parameter(torch.randn(1, count, dim) * 0.02) if count else None
        table = position_table(self.spec, dim).unsqueeze(0)
        if self.spec.learned_positions:
            self.positions = nn.Parameter(torch.randn_like(table) * 0.02)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(EncoderBlock(self.config) for _ in range(config.encoder_depth))
        self.norm: nn.Module = Norm(dim, config.bias)
        self.num_features = self.embed_dim = self.head_hidden_size = dim
        self.num_prefix_tokens, self.grad_checkpointing = count, False
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": dim,
                              "reduction": self.spec.patch_size} for i in range(len(self.blocks))]
        self.reset_classifier(num_classes, global_pool)

    @classmethod
    def of(cls, model: FourM, name: str | None = None) -> Backbone:
        """The encoder of a 4M model, sharing its blocks, norm and patch projection."""
        with torch.device("meta"):
            net = cls(model.config, name)
        index = model.config.index(net.spec.name)
        net.patches = cast(DenseInput, model.dense[str(index)])
        net.blocks, net.norm, net.registers = model.encoder, model.encoder_norm, \
            model.register_tokens
        net.modality = nn.Parameter(model.enc_modality[index].detach().clone().view(1, 1, -1))
        table = model.enc_positions.rows(net.spec).detach().clone().unsqueeze(0)
        net.positions = nn.Parameter(table) if net.spec.learned_positions else table
        return net.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [B, D], or scores [B, num_classes] with a head."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, R + rows * columns, D] of pictures [B, C, H, W], uint8 or
        normalised floats; R register tokens, where the model has any, come first."""
        x = self._embedded(x)
        for index in range(len(self.blocks)):
            x = self._through(index, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens without registers, and applies the head unless `pre_logits`."""
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *,
        return_prefix_tokens: bool = False, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:
        """Outputs of some blocks: (final tokens, list), or the list if `intermediates_only`.

        Args:
            x: Pictures [B, C, H, W].
            indices: Blocks: the last n, those of a sequence, or all.
            return_prefix_tokens: Whether each entry is a pair with its register tokens.
            norm: Whether to normalise each output by the encoder's last norm.
            stop_early: Whether to leave out blocks behind the last wanted one; the final tokens
                are then those of that block.
            output_fmt: "NCHW" for maps [B, D, rows, columns], "NLC" for tokens [B, L, D].
            intermediates_only: Whether to return the list alone.

        Raises:
            ValueError: an unknown format, or an index that is no block.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        wanted = self._indices(indices)
        rows, columns = (side // self.spec.patch_size for side in x.shape[-2:])
        x, found = self._embedded(x), []
        for index in range(max(wanted) + 1 if stop_early else len(self.blocks)):
            x = self._through(index, x)
            if index in wanted:
                found.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in found]
        found = [y[:, self.num_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            found = [y.transpose(1, 2).reshape(len(y), -1, rows, columns) for y in found]
        out: list[Any] = found
        if return_prefix_tokens and self.num_prefix_tokens:
            out = list(zip(found, prefix, strict=True))
        return out if intermediates_only else (self.norm(x), out)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what outputs of the blocks `indices` do not need, and returns these."""
        wanted = self._indices(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh head in place: a linear layer, or nothing for 0 classes."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.embed_dim, num_classes)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            self.head = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return {"modality", "registers", "positions"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for learning rates that fall with depth."""
        stem = r"^(?:patches|modality|registers|positions)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.blocks)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            chosen = list(range(count - last, count))
        else:
            chosen = [index + count if index < 0 else index for index in indices]
        if not chosen or min(chosen) < 0 or max(chosen) >= count:
            raise ValueError(f"{indices!r} does not pick from the {count} blocks")
        return chosen

    def _through(self, index: int, x: Tensor) -> Tensor:
        block = self.blocks[index]
        if self.grad_checkpointing and self.training:
            out = cast(Tensor, checkpoint(block, x, None, use_reentrant=False))
        else:
            out = block(x, None)
        past = self.drop_path_rate * index / max(len(self.blocks) - 1, 1)
        if not (past and self.training):
            return out
        through = torch.rand(len(x), 1, 1, device=x.device) >= past
        return x + (out - x) * (through / (1 - past)).to(x)

    def _embedded(self, x: Tensor) -> Tensor:
        """Encoder input [B, R + rows * columns, D]."""
        rows, columns = (side // self.spec.patch_size for side in x.shape[-2:])
        tokens = self.patches(patches(x, self.spec.patch_size, self.spec.channels))
        tokens = tokens + self._table(rows, columns).to(tokens) + self.modality
        if self.registers is None:
            return tokens
        return torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)

    def _table(self, rows: int, columns: int) -> Tensor:
        """Position vectors [1, rows * columns, D]."""
        if rows == columns == self.spec.grid:
            return self.positions
        if self.spec.learned_positions:
            raise ValueError(f"{self.spec.name} has learned positions for {self.spec.grid} x "
                             f"{self.spec.grid} patches, not for {rows} x {columns}")
        return sincos_2d(rows, self.embed_dim, columns).unsqueeze(0)


def pixels_of(config: FourMConfig, name: str | None = None) -> ModalitySpec:
    """The modality of pictures called `name`, by default the first one.

    Raises:
        ValueError: there is none; lists the choices.
    """
    pixels = [spec for spec in config.inputs if spec.kind == "pixels"]
    for spec in pixels:
        if name in (None, spec.name):
            return spec
    choices = ", ".join(spec.name for spec in pixels) or "none"
    raise ValueError(f"no pixels {name or ''} among the model's inputs; there are {choices}")


def encoder_config(config: FourMConfig, spec: ModalitySpec) -> FourMConfig:
    """The configuration of the encoder over one modality."""
    return replace(config, modalities=(replace(spec, is_target=False),), decoder_depth=0)
