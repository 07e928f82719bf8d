"""The image-text teacher of scenes: a small CLIP over captions, from scratch.

0.65 million weights, 128 px, 8 x 8 patches of 96 channels. Pictures and captions of a batch must
find each other, as in CLIP; since that alone takes a small network long, every patch also tells
what stands at its centre, through a head that is thrown away, and so the patches' features
speak of the solid where it is.

The shipped one saw 24,000 scenes in 5 minutes on a share of a busy core. A linear map reads from
its patches, on held-out scenes, the colour of the solid at 0.99, its size at 0.89, its material
at 0.63 and its shape at 0.27, which is chance: shapes need longer (`--resume`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.scenes import CLASSES, COLORS, MATERIALS, SHAPES, SIZES
from tasks.teachers.caption import mirror
from tasks.teachers.data import SIZE, TeacherScenes
from tasks.teachers.teaching import Indices, Teacher, images_of, maps_of

PATCH = 16
WIDTH = 96
LENGTH = 48
"""Tokens of the longest caption: five solids and their relations, begin and end."""

_AUXILIARY = 1.0  # weight of the patches' loss against the contrastive one
_WORDS = ("a", "an", "empty", "room", "left", "of", "in", "front", "behind")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _START, _END = 0, 2, 3

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "size": SIZES,
    "material": MATERIALS,
}
"""What is told of a solid beside its shape, and the words for it."""


def build() -> tuple[nn.Module, list[Any]]:
    """Return the untrained CLIP, and its image processor and tokenizer."""
    from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    words = (*_SPECIAL, *_WORDS, *SIZES, *COLORS, *MATERIALS, *SHAPES)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": WIDTH,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(words),
        "max_position_embeddings": LENGTH,
        "projection_dim": WIDTH,
        "hidden_act": "gelu",
        "pad_token_id": _PAD,
        "bos_token_id": _START,
        "eos_token_id": _END,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size=square, crop_size=square, do_center_crop=False, image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )  # fmt: skip
    return CLIPModel(config), [images, tokenizer]


def patch_targets(
    scenes: TeacherScenes, chosen: Indices, mirrored: bool, step: int = PATCH
) -> dict[str, Tensor]:
    """What stands at the centres of patches of `step` pixels: int64 [B, patches] each.

    Returns:
        "shape", an index into `CLASSES`, and "color", "size" and "material": 0 for none, else
        one more than the index into the words.
    """
    middle = slice(step // 2, None, step)
    shape = maps_of(scenes.classes, chosen, mirrored)[:, middle, middle].flatten(1)
    found = {"shape": shape.long()}
    instance = maps_of(scenes.instances, chosen, mirrored)[:, middle, middle].flatten(1).numpy()
    for key, words in ATTRIBUTES.items():
        rows = []
        for number, places in zip(chosen, instance, strict=True):
            solids = scenes.annotations[number]["objects"]
            table = [0, *(1 + words.index(solid[key]) for solid in solids)]
            rows.append(np.array(table)[places])
        found[key] = torch.from_numpy(np.stack(rows))
    return found


class _Learner(nn.Module):
    """CLIP, and the heads that tell what a patch shows."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        sizes = {"shape": len(CLASSES)} | {key: 1 + len(w) for key, w in ATTRIBUTES.items()}
        self.heads = nn.ModuleDict({key: nn.Linear(WIDTH, size) for key, size in sizes.items()})
        # A patch feature has no scale of its own, for whoever tokenizes it: keep it near 1.
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, inputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Contrastive loss plus the patches' loss."""
        outputs = self.clip(**inputs, return_loss=True)
        patches = self.norm(outputs.vision_model_output.last_hidden_state[:, 1:])
        told = [
            F.cross_entropy(self.heads[key](patches).flatten(0, 1).float(), target.flatten())
            for key, target in targets.items()
        ]
        return outputs.loss + _AUXILIARY * torch.stack(told).sum()


class ClipTeacher(Teacher):
    """Pictures and captions that must find each other."""

    batch_size = 64
    lr = 2e-3
    steps = 375

    def build(self) -> tuple[nn.Module, list[Any]]:
        """See `build`."""
        return build()

    def learner(self, network: nn.Module) -> nn.Module:
        """With the patches' heads."""
        return _Learner(network)

    def examples(self, chosen: Indices, rng: np.random.Generator, mirrored: bool) -> Any:
        """What CLIP takes, and what the patches must tell."""
        captions = [self.scenes.annotations[number]["caption"] for number in chosen]
        captions = [mirror(text) for text in captions] if mirrored else captions
        _, tokenizer = self.processors
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        inputs = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "pixel_values": images_of(self.scenes, chosen, mirrored),
        }
        return inputs, patch_targets(self.scenes, chosen, mirrored)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one batch."""
        return model(*batch), {}

    def is_hidden(self, name: str) -> bool:
        """Muon trains the layers' matrices."""
        return ".encoder.layers." in name
