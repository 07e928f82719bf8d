"""Surface normals, from any network of `AutoModelForNormalEstimation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, LabelerSpec, options_of
from models.labelers.inputs import InParts, Inputs, at_sizes


class NormalLabeler(InParts):
    """Writes "normal": unit float32 [H, W, 3] in camera space (x right, y up, z to the viewer).

    Options:
        signs: Factors 1 or -1 that turn the network's axes into these ((1, 1, 1)).
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForNormalEstimation

        super().__init__(spec)
        signs = options_of(spec, signs=(1, 1, 1))["signs"]
        if len(signs) != 3 or any(abs(sign) != 1 for sign in signs):
            raise ValueError(f"signs={signs!r} of a normal labeler: take three of 1 and -1")
        self.signs = torch.tensor(signs, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
        self.inputs = Inputs(self, AutoImageProcessor.from_pretrained(**self.pretrained()))
        self.model = self.compiled(self.place(self.load(AutoModelForNormalEstimation)))

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs).normals

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        return {"normal": at_sizes(_unit(outputs.float()), images, self._values)}

    def _values(self, normals: Any) -> Any:
        return (_unit(normals) * self.signs).permute(0, 2, 3, 1).contiguous()


def _unit(vectors: Any) -> Any:
    """Vectors [B, 3, H, W] of length 1; torch's own norm is 30 times slower across channels."""
    return vectors / vectors.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
