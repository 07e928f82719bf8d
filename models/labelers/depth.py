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
        if self.kind == "zoedepth" and self.inputs.processor.do_pad:
            return {"depth": [self._framed(each[None], image)
                              for each, image in zip(maps, images, strict=True)]}
        return {"depth": at_sizes(maps, images, self._values)}

    def _framed(self, depth: Any, image: Image) -> Any:
        """The value of a map [1, 1, h, w] that has a frame around the picture, as wide as
        ZoeDepth's processor has mirrored it."""
        from torch.nn.functional import interpolate

        height, width = image.shape[:2]
        top, left = (int((side / 2) ** 0.5 * 3) for side in (height, width))
        whole = interpolate(depth, (height + 2 * top, width + 2 * left), mode="bilinear")
        inner = whole[..., top : top + height, left : left + width]
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
