"""SAM as `models.labelers.sam` asks it: the model of `transformers`, or the published network of
the package `segment-anything` with the published checkpoint.

Both embed pictures of one size, answer points with masks, and bring masks to the picture's size.
B pictures of H x W, P points, three masks a point of h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from models.labelers.base import Image, stack, weights_file

if TYPE_CHECKING:
    from models.labelers.base import Labeler

Shape = tuple[int, ...]


class SamNetwork(Protocol):
    """What a labeler asks of SAM."""

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, Shape]:
        """Embeddings [B, C, e, e] of pictures, and the size (rows, columns) they are seen at."""

    def ask(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of points [1, P, 1, 2] (x, y) of a picture as it is seen: logits [3 P, h, w], and
        the overlap [3 P] that the network foretells."""

    def full(self, logits: Tensor, seen: Shape, size: Shape) -> Tensor:
        """Logits [N, h, w] as [N, H, W], at the size of the picture."""


class HubSam:
    """`SamModel` of `transformers`."""

    def __init__(self, labeler: Labeler) -> None:
        from transformers import AutoImageProcessor, SamModel

        self.device = labeler.device
        self.processor = AutoImageProcessor.from_pretrained(**labeler.pretrained())
        self.model = labeler.place(
            SamModel.from_pretrained(**labeler.pretrained(), dtype=torch.float32)
        )

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, Shape]:
        inputs = self.processor(images=list(stack(images)), return_tensors="pt")
        embeddings = self.model.get_image_embeddings(inputs["pixel_values"].to(self.device))
        return embeddings, tuple(int(side) for side in inputs["reshaped_input_sizes"][0])

    def ask(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(image_embeddings=embedding, input_points=points.to(self.device))
        return out.pred_masks[0].flatten(0, 1), out.iou_scores[0].flatten()

    def full(self, logits: Tensor, seen: Shape, size: Shape) -> Tensor:
        (found,) = self.processor.post_process_masks(
            [logits[:, None]], [size], [seen], binarize=False
        )
        return found[:, 0]


class PublishedSam:
    """A network of `segment_anything.sam_model_registry`.

    Args:
        labeler: Tells folder or repository, revision and device.
        network: Name in the registry, such as "vit_h".
        checkpoint: File of that folder or repository, .pth or .safetensors.

    Raises:
        OSError: The file is not there.
        ValueError: The registry lacks the name, or the tensors are not those of the network.
    """

    def __init__(self, labeler: Labeler, network: str, checkpoint: str) -> None:
        from segment_anything import sam_model_registry

        if network not in sam_model_registry:
            names = ", ".join(sorted(sam_model_registry))
            raise ValueError(f"network={network!r} of SAM: choose one of {names}")
        model = sam_model_registry[network]()
        tensors = read_tensors(weights_file(labeler.spec, checkpoint))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} is no checkpoint of {network}: {error}") from error
        self.device = labeler.device
        self.model = labeler.place(model)

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, Shape]:
        from segment_anything.utils.transforms import ResizeLongestSide
        from torch.nn.functional import interpolate

        side = self.model.image_encoder.img_size
        seen = ResizeLongestSide.get_preprocess_shape(*images[0].shape[:2], side)
        seen = tuple(max(1, length) for length in seen)
        pixels = stack(images).to(self.device).float()
        pixels = interpolate(pixels, seen, mode="bilinear", antialias=True).round()
        return self.model.image_encoder(self.model.preprocess(pixels)), seen

    def ask(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        places = points[0].to(self.device)
        labels = torch.ones(places.shape[:2], device=self.device)
        sparse, dense = self.model.prompt_encoder(
            points=(places, labels), boxes=None, masks=None
        )
        logits, scores = self.model.mask_decoder(
            image_embeddings=embedding, image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
        )  # fmt: skip
        return logits.flatten(0, 1), scores.flatten()

    def full(self, logits: Tensor, seen: Shape, size: Shape) -> Tensor:
        found: Tensor = self.model.postprocess_masks(logits[:, None], seen, size)
        return found[:, 0]


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors or a .pth file, of which nothing else is unpickled."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
