"""Everything that SAM finds in an image, as masks and as edges (Kirillov et al. 2023).

The image is asked at every point of an even grid; what the network is sure of, what does not hang
on the threshold and what is not found twice is kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from models.labelers.base import Image, Labeler, LabelerSpec, options_of, sure_of
from models.labelers.canny import sobel
from models.modalities.sam_instance import instance

_AT_ONCE = 2**24
"""Pixels of masks that are worked on together at the size of the image."""


class SamLabeler(Labeler):
    """Writes "sam_instance", masks best first, and "sam_edge", uint8 [H, W], in one pass.

    An edge is the slope of a mask's probability along its border, the strongest of all masks: 255
    is a step from 0 to 1 within a pixel. Edges are not thinned.

    Options:
        points_per_side: Points of the grid on a side (32).
        points_per_batch: Points that are asked about together (64).
        min_iou: Least overlap with the truth that the network foretells of a mask (0.88).
        min_stability: Least overlap of the masks at thresholds one above and one below zero (0.95).
        max_overlap: Of two masks whose boxes overlap by more than this IoU, the better is kept
            (0.7).
        min_area: Fewest pixels of a mask (1).
        max_instances: Most masks of an image (1000).
        network: A network of the package `segment-anything`, such as "vit_h", that the published
            `checkpoint` is loaded into; empty: the model is one of `transformers` ("").
        checkpoint: File of the model's folder or repository that holds it, .pth or .safetensors.

    Raises:
        ValueError: An option is unknown or out of its range.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from models.labelers.sam_networks import HubSam, PublishedSam, SamNetwork

        super().__init__(spec)
        self.options = options_of(
            spec, points_per_side=32, points_per_batch=64, min_iou=0.88, min_stability=0.95,
            max_overlap=0.7, min_area=1, max_instances=1000, network="", checkpoint="",
        )  # fmt: skip
        for name in ("points_per_side", "points_per_batch", "min_area", "max_instances"):
            if self.options[name] < 1:
                raise ValueError(f"{name}={self.options[name]} of SAM is below 1")
        name, file = self.options["network"], self.options["checkpoint"]
        if bool(name) != bool(file):
            raise ValueError(f"network={name!r} and checkpoint={file!r} of SAM go together")
        self.network: SamNetwork = PublishedSam(self, name, file) if name else HubSam(self)

    def seen(self, height: int, width: int) -> Hashable:
        return ()  # a square, whose rest is empty

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        # What fills a batch up needs no masks.
        embeddings, shapes = self.network.embed(super().filled(list(images)))
        found: dict[str, list[Any]] = {"sam_instance": [], "sam_edge": []}
        for image, embedding, shape in zip(images, embeddings, shapes, strict=False):
            masks, scores = self._masks(embedding[None], shape)
            value, edge = self._at_full_size(masks, scores, shape, image.shape[:2])
            found["sam_instance"].append(value)
            found["sam_edge"].append(edge)
        return found

    def filled(self, items: list[Any]) -> list[Any]:
        return items

    def _masks(self, embedding: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Logits [N, h, w] and scores [N] of the masks that are kept, best first."""
        import torch
        from torchvision.ops import masks_to_boxes, nms

        kept, scores = [], []
        for points in self._points(shape):
            logits, sure = (each.float() for each in self.network.ask(embedding, points))
            sure_of(logits, sure)
            chosen = sure >= self.options["min_iou"]
            logits, sure = logits[chosen], sure[chosen]
            inside = _inside(logits, shape)
            chosen = _stability(inside) >= self.options["min_stability"]
            chosen &= (inside > 0).any(2).any(1)
            kept.append(logits[chosen])
            scores.append(sure[chosen])
        logits, sure = torch.cat(kept), torch.cat(scores)
        if len(logits):
            boxes = masks_to_boxes(_inside(logits, shape) > 0)
            boxes[:, 2:] += 1  # they name the last pixel
            best = nms(boxes, sure, self.options["max_overlap"])[: self.options["max_instances"]]
            logits, sure = logits[best], sure[best]
        return logits, sure

    def _points(self, shape: tuple[int, ...]) -> Iterator[Any]:
        """Grids of points (x, y) in pixels of what the network sees, [1, P, 1, 2] at a time."""
        import torch

        side = self.options["points_per_side"]
        steps = (torch.arange(side) + 0.5) / side
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, -1, 1, 2)
        grid = grid * torch.tensor([shape[1], shape[0]])
        yield from grid.split(self.options["points_per_batch"], dim=1)

    def _at_full_size(
        self, logits: Any, scores: Any, shape: tuple[int, ...], size: tuple[int, int]
    ) -> tuple[dict[str, Any], Image]:
        edge = np.zeros(size, np.float32)
        instances: list[dict[str, Any]] = []
        if not len(logits):
            return {"size": list(size), "instances": []}, edge.astype(np.uint8)
        together = max(1, _AT_ONCE // (size[0] * size[1]))
        for part, sure in zip(logits.split(together), scores.split(together), strict=True):
            full = self.network.full(part, shape, size).float().cpu().numpy()
            for mask, score in zip(full > 0, sure.tolist(), strict=True):
                found = instance(mask, score)
                if found and int(mask.sum()) >= self.options["min_area"]:
                    instances.append(found)
            edge = np.maximum(edge, _slopes(full).max(0, initial=0))
        value = {"size": list(size), "instances": instances}
        return value, np.rint(edge * 255).astype(np.uint8)


def _inside(logits: Any, shape: tuple[int, ...]) -> Any:
    """What masks [N, h, w] of the network's square say of the picture, which lies in its upper left
    corner and has the square's side as its longer one: of the empty rest they may say anything."""
    rows, columns = (
        math.ceil(seen * side / max(shape))
        for seen, side in zip(shape, logits.shape[1:], strict=True)
    )
    return logits[:, :rows, :columns]


def _stability(logits: Any) -> Any:
    """Overlap [N] of what lies above one and what lies above minus one."""
    inner, outer = ((logits > level).flatten(1).sum(1) for level in (1.0, -1.0))
    return inner / outer.clamp_min(1)


def _slopes(logits: np.ndarray) -> np.ndarray:
    """How fast the probability of masks changes on their own border, [N, H, W] in 0..1."""
    inside = logits > 0
    around = np.pad(inside, ((0, 0), (1, 1), (1, 1)), mode="edge")
    whole = around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    probability = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    dx, dy = sobel(probability)
    return np.minimum(np.hypot(dx, dy) / 4, 1) * (inside & ~whole)
