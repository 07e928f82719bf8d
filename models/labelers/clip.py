"""Patch features of image-text networks: the vision tower of CLIP, SigLIP and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.labelers.base import Image, Labeler, LabelerSpec, options_of, stack


class ClipLabeler(Labeler):
    """Writes "clip": float16 [h, w, C], the vision tower's last hidden state of every patch.

    The map covers the whole image: where processors would cut out its middle, the image is
    squeezed into the network's square instead.

    Options:
        image_size: Side in pixels of that square (the checkpoint's own). Another than the
            checkpoint's interpolates its position embeddings.
    """

    def __init__(self, spec: LabelerSpec) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        super().__init__(spec)
        self.processor = AutoImageProcessor.from_pretrained(**self.pretrained())
        model = AutoModel.from_pretrained(**self.pretrained(), dtype=torch.float32)
        self.model = self.place(getattr(model, "vision_model", model))
        config = self.model.config
        options = options_of(spec, image_size=config.image_size)
        size = int(options["image_size"])
        if size % config.patch_size:
            raise ValueError(f"image_size={size} is no multiple of {config.patch_size} (patches)")
        self.size = {"height": size, "width": size}
        self.side = size // config.patch_size
        self.interpolate = size != config.image_size

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        inputs = self.processor(
            images=list(stack(images)), size=self.size, do_center_crop=False, return_tensors="pt"
        ).to(self.device)
        extra = {"interpolate_pos_encoding": True} if self.interpolate else {}
        hidden = self.model(pixel_values=inputs["pixel_values"], **extra).last_hidden_state
        # The class token, where there is one, and registers come before the patches.
        patches = hidden[:, hidden.shape[1] - self.side**2 :]
        maps = patches.reshape(len(images), self.side, self.side, -1)
        return {"clip": list(maps.float().cpu().numpy().astype(np.float16))}
