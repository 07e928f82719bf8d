"""Semantic segmentation, from per-pixel classifiers and from universal segmenters.

Per-pixel networks are those of `AutoModelForSemanticSegmentation` (SegFormer, UPerNet, BEiT,
DPT, ...); universal ones those of `AutoModelForUniversalSegmentation` whose processor can write
semantic maps (Mask2Former, EoMT, ...). The checkpoint's type decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, Labeler, LabelerSpec, options_of
from models.labelers.inputs import Inputs, at_sizes

MAX_CLASSES = 255
"""Class ids are bytes, and 255 stands for "unlabelled"."""


class SemsegLabeler(Labeler):
    """Writes "semseg": uint8 [H, W] class ids of the checkpoint; it has no options.

    Raises:
        ValueError: The checkpoint knows more than `MAX_CLASSES` classes.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        import torch
        from transformers import (
            MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
            AutoConfig,
            AutoImageProcessor,
            AutoModelForSemanticSegmentation,
            AutoModelForUniversalSegmentation,
        )

        super().__init__(spec)
        options_of(spec)
        config = AutoConfig.from_pretrained(**self.pretrained())
        self.universal = type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
        auto = (
            AutoModelForUniversalSegmentation
            if self.universal
            else AutoModelForSemanticSegmentation
        )
        self.inputs = Inputs(self, AutoImageProcessor.from_pretrained(**self.pretrained()))
        self.model = self.compiled(
            self.place(auto.from_pretrained(**self.pretrained(), dtype=torch.float32))
        )
        self.names = [config.id2label[number] for number in sorted(config.id2label)]
        if len(self.names) > MAX_CLASSES:
            raise ValueError(
                f"{spec.model_id} knows {len(self.names)} classes; semseg holds {MAX_CLASSES}"
            )

    def seen(self, height: int, width: int) -> Hashable:
        return self.inputs.shape(height, width)

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        inputs = self.inputs(images)
        if self.universal:
            return {"semseg": self._universal(inputs, images)}
        return {"semseg": at_sizes(self.model(**inputs).logits.float(), images, _classes)}

    def _universal(self, inputs: Any, images: Sequence[Image]) -> list[Any]:
        outputs = self.model(pixel_values=inputs["pixel_values"])
        if "patch_offsets" in inputs:  # EoMT cuts an image into windows and joins them again
            outputs.patch_offsets = inputs["patch_offsets"]
        maps = self.inputs.processor.post_process_semantic_segmentation(
            outputs, target_sizes=[image.shape[:2] for image in images]
        )
        return [each.byte().cpu().numpy() for each in maps]


def _classes(logits: Any) -> Any:
    return logits.max(1).indices.byte()
