"""Poses of the people that a detector has found, from ViTPose (`AutoModelForPoseEstimation`).

4M-21 took HMR2.0, whose SMPL bodies are bound to a non-commercial licence; 2-D keypoints of ViTPose
take their place.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from models.labelers.base import Labeler, LabelerSpec, options_of
from models.modalities.human_poses import KEYPOINTS


class PoseLabeler(Labeler):
    """Writes "human_poses": {"humans": [{"box", "score", "keypoints": [[x, y, score]] of 17}]}.

    Looks at the picture and at the boxes of "det"; without people among them the network does not
    run. Coordinates are in 0..1 of the image.

    Options:
        person: Class name of the boxes that are looked at ("person").
        min_score: Least score of such a box (0.5).
        max_humans: Most people of an image, the best boxes first (50).

    Raises:
        ValueError: An option is unknown or out of its range, or the network knows other keypoints.
    """

    reads: ClassVar[tuple[str, ...]] = ("rgb", "det")
    compiles: ClassVar[bool] = True
    at_once: ClassVar[int] = 4  # pictures without people among them fill no batch

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import AutoImageProcessor, AutoModelForPoseEstimation

        super().__init__(spec)
        options = options_of(spec, person="person", min_score=0.5, max_humans=50)
        if options["max_humans"] < 1 or not 0 <= options["min_score"] <= 1:
            raise ValueError(
                f"max_humans={options['max_humans']}, min_score={options['min_score']} of poses: "
                "take at least 1, and 0 to 1"
            )
        self.options = options
        self.processor = AutoImageProcessor.from_pretrained(**self.pretrained())
        self.model = self.compiled(self.place(self.load(AutoModelForPoseEstimation)))
        if (known := len(self.model.config.id2label)) != len(KEYPOINTS):
            raise ValueError(f"{spec.model_id} knows {known} keypoints, not {len(KEYPOINTS)}")

    def seen(self, height: int, width: int) -> Hashable:
        return ()  # people are cut out

    def label_samples(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """One forward pass holds people of several images."""
        people = [
            (number, sample["rgb"], person)
            for number, sample in enumerate(samples)
            for person in self._people(sample["det"])
        ]
        humans: list[list[dict[str, Any]]] = [[] for _ in samples]
        poses = self.in_batches([(image, person["box"]) for _, image, person in people])
        for (number, _, person), points in zip(people, poses["human_poses"], strict=True):
            humans[number].append(
                {"box": person["box"], "score": person["score"], "keypoints": points}
            )
        return {"human_poses": [{"humans": each} for each in humans]}

    def predict(self, images: Sequence[Any]) -> dict[str, list[Any]]:
        import torch

        boxes = [[_corner_and_size(box, image)] for image, box in images]
        pictures = [torch.from_numpy(image).permute(2, 0, 1) for image, _ in images]
        inputs = self.processor(images=pictures, boxes=boxes, return_tensors="pt").to(self.device)
        experts = getattr(self.model.config.backbone_config, "num_experts", 1)
        which = {"dataset_index": torch.zeros(len(images), dtype=torch.long, device=self.device)}
        outputs = self.model(pixel_values=inputs["pixel_values"], **(which if experts > 1 else {}))
        outputs.heatmaps = outputs.heatmaps.float()
        found = self.processor.post_process_pose_estimation(outputs, boxes=boxes)
        return {
            "human_poses": [
                _keypoints(each[0], image) for each, (image, _) in zip(found, images, strict=True)
            ]
        }

    def _people(self, det: dict[str, Any]) -> list[dict[str, Any]]:
        chosen = [
            {"box": each["box"], "score": each.get("score", 1.0)}
            for each in det["instances"]
            if each["class_name"] == self.options["person"]
            and each.get("score", 1.0) >= self.options["min_score"]
        ]
        chosen.sort(key=lambda each: -each["score"])
        return chosen[: self.options["max_humans"]]


def _corner_and_size(box: Sequence[float], image: np.ndarray) -> list[float]:
    """A box in 0..1 as (left, top, width, height) in pixels, no thinner than one."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    return [x0 * width, y0 * height, max(1.0, (x1 - x0) * width), max(1.0, (y1 - y0) * height)]


def _keypoints(found: dict[str, Any], image: np.ndarray) -> list[list[float]]:
    """Points in 0..1 of the image; one that is not finite has score 0 and lies in the corner."""
    height, width = image.shape[:2]
    points = np.asarray(found["keypoints"], np.float64) / [width, height]
    scores = np.clip(np.asarray(found["scores"], np.float64).reshape(-1, 1), 0, 1)
    whole = np.concatenate([points, scores], axis=1)
    whole[~np.isfinite(whole).all(1)] = 0
    return whole.tolist()
