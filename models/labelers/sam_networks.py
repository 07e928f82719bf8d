"""SAM as `models.labelers.sam` asks it: the model of `transformers`, or the published network of
the package `segment-anything` with the published checkpoint.

Both embed pictures, answer points with masks, and bring masks to the picture's size.
B pictures of H x W, P points, three masks a point of h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from infra.weights import read_pickled, read_safetensors
from models.labelers.base import Image, weights_file
from models.labelers.inputs import Inputs, rows

if TYPE_CHECKING:
    from models.labelers.base import Labeler

Shape = tuple[int, ...]


class SamNetwork(Protocol):
    """What a labeler asks of SAM."""

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, list[Shape]]:
        """Embeddings [B, C, e, e] of pictures, and the sizes (rows, columns) they are seen at."""

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
        self.inputs = Inputs(labeler, AutoImageProcessor.from_pretrained(**labeler.pretrained()))
        self.model = labeler.place(labeler.load(SamModel))
        labeler.compiled(self.model.vision_encoder)

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, list[Shape]]:
        inputs = self.inputs(images)
        embeddings = self.model.get_image_embeddings(inputs["pixel_values"])
        return embeddings, [tuple(sides) for sides in inputs["reshaped_input_sizes"].tolist()]

    def ask(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(image_embeddings=embedding, input_points=points.to(self.device))
        return out.pred_masks[0].flatten(0, 1), out.iou_scores[0].flatten()

    def full(self, logits: Tensor, seen: Shape, size: Shape) -> Tensor:
        (found,) = self.inputs.processor.post_process_masks(
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
        labeler.compiled(self.model.image_encoder)

    def embed(self, images: Sequence[Image]) -> tuple[Tensor, list[Shape]]:
        padded = torch.stack(rows(images, self.device, self._padded))
        return self.model.image_encoder(padded), [self._seen(*i.shape[:2]) for i in images]

    def _padded(self, pixels: Tensor) -> Tensor:
        seen = self._seen(pixels.shape[2], pixels.shape[3])
        pixels = interpolate(pixels.float(), seen, mode="bilinear", antialias=True).round()
        padded: Tensor = self.model.preprocess(pixels)
        return padded

    def _seen(self, height: int, width: int) -> Shape:
        from segment_anything.utils.transforms import ResizeLongestSide

        side = self.model.image_encoder.img_size
        sides = ResizeLongestSide.get_preprocess_shape(height, width, side)
        return tuple(max(1, length) for length in sides)

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
    found = read_safetensors(path)[1] if path.suffix == ".safetensors" else read_pickled(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no tensors by name")
    return found
