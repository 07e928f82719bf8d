"""Boxes of objects, from any detector of `AutoModelForObjectDetection`.

That is RT-DETR (v2), D-FINE, DETR and its kin, RF-DETR, YOLOS and others; the classes are the
ones that the checkpoint was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, LabelerSpec, options_of, sure_of
from models.labelers.inputs import InParts, Inputs


def _exact(call: Callable[[Any], Any], device: str) -> Callable[[Any], Any]:
    """A call of a network's part in float32, within autocast."""
    import torch

    def run(values: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return call(values.float())

    return run


class DetectionLabeler(InParts):
    """Writes "det": {"instances": [{"box": [xmin, ymin, xmax, ymax], "class_name", "score"}]}.

    Boxes are in 0..1 of the image, best first.

    Options:
        threshold: Least score in 0..1 of an instance (0.4).
        max_overlap: Of two boxes, whatever their classes, that overlap by more than this IoU, the
            better is kept; 1 keeps all (0.7).
        max_instances: Most instances kept of an image (100).

    Raises:
        ValueError: An option is unknown or out of its range.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        super().__init__(spec)
        options = options_of(spec, threshold=0.4, max_overlap=0.7, max_instances=100)
        for name in ("threshold", "max_overlap"):
            if not 0 <= options[name] <= 1:
                raise ValueError(f"{name}={options[name]} of a detector is not in 0..1")
        self.threshold, self.max_overlap = options["threshold"], options["max_overlap"]
        self.max_instances = options["max_instances"]
        if self.max_instances < 1:
            raise ValueError(f"max_instances={self.max_instances} of a detector is below 1")
        self.inputs = Inputs(self, AutoImageProcessor.from_pretrained(**self.pretrained()))
        self.model = self.compiled(self.place(self.load(AutoModelForObjectDetection)))
        self.names = self.model.config.id2label
        if self.autocast_dtype is not None:
            self._place_boxes_exactly()

    def _place_boxes_exactly(self) -> None:
        """Let the small heads that place boxes keep out of half precision, whose 8 bits are 1/512
        of the picture: a pixel of 640, at no gain."""
        import torch

        for name, part in self.model.named_modules():
            own = any("bbox" in each for each in name.split(".")[-2:])
            if own and not isinstance(part, torch.nn.ModuleList):
                part.forward = _exact(part.forward, self.device.type)

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        import torch

        sure_of(outputs.logits, outputs.pred_boxes)
        # Corners and scores in half precision would be coarser than what the network tells.
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        # The boxes of an image of 1 x 1 pixels are relative ones.
        found = self.inputs.processor.post_process_object_detection(
            outputs, threshold=self.threshold, target_sizes=torch.ones(len(images), 2)
        )
        return {"det": [{"instances": self._instances(each)} for each in found]}

    def _instances(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        from torchvision.ops import nms

        # A few hundred numbers an image: the device has done its part.
        found = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
        boxes, scores = found["boxes"].float().clamp(0, 1), found["scores"].float()
        whole = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        best = whole[nms(boxes[whole], scores[whole], self.max_overlap)][: self.max_instances]
        chosen = (boxes[best].tolist(), found["labels"][best].tolist(), scores[best].tolist())
        return [
            {"box": box, "class_name": self.names[label], "score": score}
            for box, label, score in zip(*chosen, strict=True)
        ]
