"""Patch features and whole-image vectors of vision transformers: CLIP, DINOv2, ImageBind, ...

Any `AutoModel` with a vision tower will do; ImageBind, which transformers lacks, is implemented in
`models.labelers.imagebind` and recognised by its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from models.labelers.base import Image, Labeler, LabelerSpec, options_of
from models.labelers.inputs import InParts, Inputs

GLOBAL = "_global"
"""What the name of a whole-image vector adds to the one of its map."""


class Tower(Protocol):
    """A vision network as the labeler sees it."""

    image_size: int
    """Side in pixels of the square that it was trained on."""
    patch_size: int
    model: Any

    def see(self, size: int) -> None:
        """Say how large the square is that images are squeezed into."""
        ...

    def project(self) -> None:
        """Say that features are to go through the projection that texts are compared by."""
        ...

    def prepare(self, images: Sequence[Image]) -> Any:
        """Images as pixels [B, 3, size, size]."""
        ...

    def features(self, pixels: Any) -> tuple[Any, Any]:
        """Those to patches [B, N, C] and vectors [B, C]."""
        ...


class FeatureLabeler(InParts):
    """Writes the modality of its kind, float16 [h, w, C], and where it is asked for its `_global`
    vector, float16 [C], in one pass.

    The map holds the last hidden state of every patch, or what CLIP would compare with texts. It
    covers the whole image: where processors would cut out its middle, the image is squeezed into
    the network's square instead. The vector is what the network pools: the class token after the
    last norm (CLIP, DINOv2), the attention pool (SigLIP), see `models.labelers.imagebind` for
    ImageBind.

    Options:
        image_size: Side in pixels of that square; 0 is the checkpoint's own. Another than the
            checkpoint's interpolates its position embeddings (0).
        scale: How many times larger than that the side is (1).
        projected: Whether patches and vector go through CLIP's last norm and its projection, as the
            features of 4M do: 512 numbers instead of the 768 of ViT-B (False).

    Raises:
        ValueError: The size is no multiple of the network's patches, or the network has no such
            projection.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import PretrainedConfig

        from models.labelers.imagebind import ImageBindTower, is_imagebind

        super().__init__(spec)
        options = options_of(spec, image_size=0, scale=1.0, projected=False)
        config, _ = PretrainedConfig.get_config_dict(**self.pretrained())
        build: Callable[[Labeler], Tower] = (
            ImageBindTower if is_imagebind(config) else _HubTower
        )
        self.tower = build(self)
        if options["projected"]:
            self.tower.project()
        side = int(options["image_size"]) or self.tower.image_size
        self.size = round(side * float(options["scale"]))
        if self.size % self.tower.patch_size:
            raise ValueError(
                f"image_size={self.size} is no multiple of {self.tower.patch_size} (patches)"
            )
        self.side = self.size // self.tower.patch_size
        self.tower.see(self.size)

    def seen(self, height: int, width: int) -> Hashable:
        return self.size

    def prepare(self, images: Sequence[Image]) -> Any:
        return self.tower.prepare(images)

    def forward(self, inputs: Any) -> Any:
        return self.tower.features(inputs)

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        patches, vectors = outputs
        maps = patches.reshape(len(images), self.side, self.side, -1)
        found = {}
        for name in self.spec.outputs:
            values = vectors if name.endswith(GLOBAL) else maps
            found[name] = list(values.half().cpu().numpy())
        return found


def finer(spec: LabelerSpec, name: str, scale: float) -> LabelerSpec | None:
    """The labeler that writes the map `name` alone, of pictures with `scale` times the side; None
    where it writes no such map."""
    from models.labelers.registry import labeler_class

    if name not in spec.outputs or name.endswith(GLOBAL):
        return None
    if not issubclass(labeler_class(spec.name), FeatureLabeler):
        return None
    return replace(spec, outputs=(name,), options={**spec.options, "scale": scale})


class _HubTower:
    """The vision tower of a checkpoint of `AutoModel`, with its processor."""

    def __init__(self, labeler: Labeler) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.labeler = labeler
        self.processor = AutoImageProcessor.from_pretrained(**labeler.pretrained())
        pooled = any(name.endswith(GLOBAL) for name in labeler.spec.outputs)
        model = labeler.load(AutoModel, spare=() if pooled else ("pooler",))
        self.model = labeler.compiled(labeler.place(getattr(model, "vision_model", model)))
        self.projection: Any = getattr(model, "visual_projection", None)
        self.projected = False
        self.image_size, self.patch_size = (
            self.model.config.image_size, self.model.config.patch_size,
        )  # fmt: skip
        # DINOv2 always fits its positions to the image; others have to be told.
        self.told = not self.model.config.model_type.startswith("dinov2")

    def see(self, size: int) -> None:
        square = {"height": size, "width": size}
        self.inputs = Inputs(self.labeler, self.processor, do_center_crop=False, size=square)

    def project(self) -> None:
        if self.projection is None or not hasattr(self.model, "post_layernorm"):
            source = self.labeler.spec.model_id
            raise ValueError(f"projected=True: {source} has no projection, as CLIP's have")
        self.projection, self.projected = self.labeler.place(self.projection), True

    def prepare(self, images: Sequence[Image]) -> Any:
        return self.inputs(images)["pixel_values"]

    def features(self, pixels: Any) -> tuple[Any, Any]:
        size = pixels.shape[-1]
        told = self.told and size != self.image_size
        extra = {"interpolate_pos_encoding": True} if told else {}
        out = self.model(pixel_values=pixels, **extra)
        # The class token, where there is one, and registers come before the patches.
        patches = (size // self.patch_size) ** 2
        hidden = out.last_hidden_state
        hidden = hidden[:, hidden.shape[1] - patches :]
        if self.projected:  # what is pooled has gone through the norm
            hidden = self.projection(self.model.post_layernorm(hidden))
            return hidden, self.projection(out.pooler_output)
        return hidden, out.pooler_output
