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
            stretched over the image's own range). Default "metric".
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

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs).predicted_depth

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        return {"depth": at_sizes(outputs[:, None].float(), images, self._values)}

    def _values(self, depth: Any) -> Any:
        depth = depth[:, 0]
        if self.scale == "metric":
            value = depth / self.max_depth
        else:
            low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
            value = 1 - (depth - low) / (high - low).clamp_min(1e-6)
        return value.clamp(0, 1)
