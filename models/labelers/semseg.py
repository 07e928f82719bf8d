"""Semantic segmentation, from per-pixel classifiers and from universal segmenters.

Per-pixel networks are those of `AutoModelForSemanticSegmentation` (SegFormer, UPerNet, BEiT,
DPT, ...); universal ones those of `AutoModelForUniversalSegmentation` whose processor can write
semantic maps (Mask2Former, EoMT, ...). The checkpoint's type decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, LabelerSpec, options_of, sure_of
from models.labelers.inputs import InParts, Inputs, at_sizes

MAX_CLASSES = 255
"""Class ids are bytes, and 255 stands for "unlabelled"."""
_LOGITS = ("class_queries_logits", "masks_queries_logits", "logits", "pred_masks")


class SemsegLabeler(InParts):
    """Writes "semseg": uint8 [H, W] class ids of the checkpoint; it has no options.

    Raises:
        ValueError: The checkpoint knows more than `MAX_CLASSES` classes.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
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
        self.model = self.compiled(self.place(self.load(auto, spare=("auxiliary_head",))))
        self.names = [config.id2label[number] for number in sorted(config.id2label)]
        if len(self.names) > MAX_CLASSES:
            raise ValueError(
                f"{spec.model_id} knows {len(self.names)} classes; semseg holds {MAX_CLASSES}"
            )

    def forward(self, inputs: Any) -> Any:
        if not self.universal:
            return self.model(**inputs).logits
        outputs = self.model(pixel_values=inputs["pixel_values"])
        if "patch_offsets" in inputs:  # EoMT cuts an image into windows and joins them again
            outputs.patch_offsets = inputs["patch_offsets"]
        return outputs

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        if self.universal:
            return {"semseg": self._universal(outputs, images)}
        return {"semseg": at_sizes(outputs.float(), images, _classes)}

    def _universal(self, outputs: Any, images: Sequence[Image]) -> list[Any]:
        sure_of(*(outputs[name] for name in _LOGITS if name in outputs))
        sizes = [image.shape[:2] for image in images]
        maps = self.inputs.processor.post_process_semantic_segmentation(
            outputs, target_sizes=[self._filled(*size) for size in sizes]
        )
        return [
            each[:height, :width].byte().cpu().numpy()
            for each, (height, width) in zip(maps, sizes, strict=True)
        ]

    def _filled(self, height: int, width: int) -> tuple[int, int]:
        """Size of a picture with what EoMT's processor adds below or beside it to fill a square,
        as for networks of panoptic classes: its semantic maps show that, too."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        processor = self.inputs.processor
        fills = hasattr(processor, "unpad_image") and processor.do_pad
        if not fills or processor.do_split_image:
            return height, width
        short, long = processor.size["shortest_edge"], processor.size["longest_edge"]
        seen = get_size_with_aspect_ratio((height, width), short, long)
        whole = (max(short, seen[0]), max(long or short, seen[1]))
        return round(height * whole[0] / seen[0]), round(width * whole[1] / seen[1])


def _classes(logits: Any) -> Any:
    best = logits.max(1)
    sure_of(best.values)
    return best.indices.byte()
