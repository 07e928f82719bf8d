"""The vision part of ImageBind (Girdhar et al. 2023), built so that published weights load.

A ViT with pre-norm blocks, a norm before the first one and learned positions. The published network
sees a still image as a film of two equal frames, so its 3-D patch kernel is summed over time.
Published checkpoints are CC-BY-NC-SA: what is labelled with them inherits their terms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.weights import read_safetensors
from models.labelers.base import Image, weights_file
from models.labelers.inputs import rows

if TYPE_CHECKING:
    from models.labelers.base import Labeler

_EPS = 1e-6
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEADS = 16  # of the published network; tensors do not tell

_NAMES = (
    (r"^modality_preprocessors\.vision\.cls_token$", "cls_token"),
    (r"^modality_preprocessors\.vision\.pos_embedding_helper\.pos_embed$", "positions"),
    (r"^modality_preprocessors\.vision\.rgbt_stem\.proj\.1\.weight$", "stem.weight"),
    (r"^modality_trunks\.vision\.pre_transformer_layer\.0\.", "norm_in."),
    (r"^modality_trunks\.vision\.blocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.qkv."),
    (r"^modality_trunks\.vision\.blocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.proj."),
    (r"^modality_trunks\.vision\.blocks\.(\d+)\.mlp\.(fc[12])\.", r"blocks.\1.\2."),
    (r"^modality_trunks\.vision\.blocks\.(\d+)\.(norm_[12])\.", r"blocks.\1.\2."),
    (r"^modality_heads\.vision\.0\.", "norm_out."),
)
"""Published names of what is used, and ours."""


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class ImageBindVision(nn.Module):
    """Normalised pixels [B, 3, S, S] to patches [B, N, C] and class tokens [B, C].

    Patches leave as the trunk makes them, class tokens after the norm of the head: the joint
    embedding is a linear map of them.
    """

    def __init__(self, width: int, depth: int, heads: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.blocks = nn.ModuleList(_Block(width, heads, 4 * width) for _ in range(depth))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.stem(pixels)
        x = torch.cat([self.cls_token.expand(len(grid), -1, -1), grid.flatten(2).mT], 1)
        x = self.norm_in(x + self._positions(grid.shape[-2], grid.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return x[:, 1:], self.norm_out(x[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        side = int((self.positions.shape[1] - 1) ** 0.5)
        if (height, width) == (side, side):
            return self.positions
        first, rest = self.positions[:, :1], self.positions[:, 1:]
        square = rest.mT.reshape(1, -1, side, side).float()
        fitted = F.interpolate(square, (height, width), mode="bicubic")
        return torch.cat([first, fitted.flatten(2).mT.to(first.dtype)], 1)


def from_published(tensors: Mapping[str, Tensor], heads: int) -> ImageBindVision:
    """The network of a published state dict; what belongs to other senses is passed over.

    Raises:
        ValueError: Tensors are missing.
    """
    own = {}
    for name, tensor in tensors.items():
        for pattern, ours in _NAMES:
            if re.match(pattern, name):
                own[re.sub(pattern, ours, name)] = tensor.float()
    missing = {"stem.weight", "positions", "cls_token"} - own.keys()
    if missing:
        raise ValueError(f"no ImageBind checkpoint: it lacks {', '.join(sorted(missing))}")
    own["stem.weight"] = own["stem.weight"].sum(2)
    width, _, patch, _ = own["stem.weight"].shape
    depth = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
    model = ImageBindVision(width, depth, heads, patch, own["positions"].shape[1])
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"no ImageBind checkpoint: {error}") from error
    return model


def is_imagebind(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of the published network."""
    return "vision_embed_dim" in config and "model_type" not in config


class ImageBindTower:
    """ImageBind as `models.labelers.features` sees it."""

    def __init__(self, labeler: Labeler) -> None:
        config = json.loads(weights_file(labeler.spec, "config.json").read_text())
        file = weights_file(labeler.spec, "model.safetensors")
        _, tensors = read_safetensors(file, ".vision.")
        heads = int(config.get("vision_num_heads", _HEADS))
        self.model = labeler.compiled(labeler.place(from_published(tensors, heads)))
        self.patch_size = self.model.stem.kernel_size[0]
        self.image_size = int((self.model.positions.shape[1] - 1) ** 0.5) * self.patch_size
        self.device = labeler.device

    def project(self) -> None:
        raise ValueError("projected=True: ImageBind's features are those before its projection")

    def see(self, size: int) -> None:
        self.square = (size, size)

    def prepare(self, images: Sequence[Image]) -> Tensor:
        def squeezed(pixels: Tensor) -> Tensor:
            square = F.interpolate(pixels.float(), self.square, mode="bicubic", antialias=True)
            return square.round().clamp(0, 255) / 255

        pixels = torch.stack(rows(images, self.device, squeezed))
        mean, std = (
            torch.tensor(each, device=self.device).view(1, 3, 1, 1) for each in (_MEAN, _STD)
        )
        return (pixels - mean) / std

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(pixels)
