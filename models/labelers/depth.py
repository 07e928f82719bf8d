"""Depth, from any network of `AutoModelForDepthEstimation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, LabelerSpec, options_of
from models.labelers.inputs import InParts, Inputs, at_sizes


class DepthLabeler(InParts):
    """Writes "depth": float32 [H, W] in 0..1, far is large.

    Options:
        scale: What the network predicts: "metric" (metres; the value is metres / max_depth) or
            "inverse" (unscaled inverse depth, as Depth Anything and DPT; the value is 1 minus it,
            stretched over the image's own range). Depth Pro can be either. Default "metric".
        max_depth: Metres that become 1 (20). Only of "metric".
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        super().__init__(spec)
        options = options_of(spec, scale="metric", max_depth=20.0)
        self.scale, self.max_depth = options["scale"], float(options["max_depth"])
        if self.scale not in ("metric", "inverse"):
            raise ValueError(f"scale={self.scale!r} of a depth labeler: take 'metric' or 'inverse'")
        self.inputs = Inputs(self, AutoImageProcessor.from_pretrained(**self.pretrained()))
        self.model = self.compiled(self.place(self.load(AutoModelForDepthEstimation)))
        self.kind = self.model.config.model_type

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        maps = outputs.predicted_depth[:, None].float()
        if self.kind == "depth_pro" and outputs.field_of_view is not None:
            # It predicts inverse depth times the focal length over the picture's width.
            angle = outputs.field_of_view.float().deg2rad() / 2
            maps = maps * (2 * angle.tan())[:, None, None, None]
        frames = [self._frame(*image.shape[:2]) for image in images]
        if not any(map(any, frames)):
            return {"depth": at_sizes(maps, images, self._values)}
        rows = zip(maps.split(1), images, frames, strict=True)
        return {"depth": [self._within(*row) for row in rows]}

    def _frame(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels that a processor adds to a picture: above, below, left and right of it."""
        processor = self.inputs.processor
        if not getattr(processor, "do_pad", False):
            return 0, 0, 0, 0
        if self.kind == "zoedepth":
            y, x = (int((side / 2) ** 0.5 * 3) for side in (height, width))
            return y, y, x, x
        if self.kind == "dpt" and not processor.do_resize:  # on DINOv2, whose patches it fills
            y, x = (-side % processor.size_divisor for side in (height, width))
            return y // 2, y - y // 2, x // 2, x - x // 2
        return 0, 0, 0, 0

    def _within(self, depth: Any, image: Image, frame: tuple[int, int, int, int]) -> Any:
        """The value of a map [1, 1, h, w] of a picture and the frame around it."""
        from torch.nn.functional import interpolate

        height, width = image.shape[:2]
        above, below, left, right = frame
        whole = interpolate(depth, (height + above + below, width + left + right), mode="bilinear")
        inner = whole[..., above : above + height, left : left + width]
        return self._values(inner)[0].cpu().numpy()

    def _values(self, depth: Any) -> Any:
        depth = depth[:, 0]
        if self.scale == "metric":
            if self.kind == "depth_pro":
                depth = 1 / depth.clamp_min(1e-4)
            value = depth / self.max_depth
        else:
            low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
            value = 1 - (depth - low) / (high - low).clamp_min(1e-6)
        return value.clamp(0, 1)
