"""4M's encoder among timm's models: importing this module registers it.

    import timm, models.fourm.timm_models
    net = timm.create_model("fourm_base_patch16_224", features_only=True, out_indices=(5, 11))
    net = timm.create_model("fourm_base_patch16_224.4m21", pretrained=True, num_classes=10)

`pretrained=True` fetches a released 4M checkpoint and keeps its encoder; these weights carry a
non-commercial licence of their own. Whether a released checkpoint has QK-norm is read from its
tensors: a model built without what the file has is refused with the argument to pass. No released
file was at hand when this was written. `pretrained_cfg_overlay={"file": ...}` takes a local one.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from models.fourm.backbone import Backbone
from models.fourm.embeddings import IMAGE_MEAN, IMAGE_STD
from models.fourm.spec import FourMConfig, ModalitySpec

PIXELS = "rgb@224"


class FourMViT(Backbone):
    """`Backbone` with the arguments that timm gives to a vision transformer."""

    def __init__(
        self, *, embed_dim: int, depth: int, num_heads: int, img_size: int = 224,
        patch_size: int = 16, in_chans: int = 3, num_classes: int = 0, global_pool: str = "avg",
        mlp_ratio: float = 4.0, qk_norm: bool = False, bias: bool = False, gated_mlp: bool = True,
        num_registers: int = 0, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:
        """
        Args:
            embed_dim: Width.
            depth: Blocks.
            num_heads: Heads of attention.
            img_size: Side of a picture; only decides which table of positions is kept ready.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of a picture.
            num_classes: Outputs of the head; 0 for none.
            global_pool: "avg", or "" for tokens.
            mlp_ratio: MLP width over `embed_dim`; a gated MLP has 2/3 of it.
            qk_norm: Whether queries and keys are normalised by head.
            bias: Whether norms, attention and MLP have biases.
            gated_mlp: SwiGLU rather than GELU.
            num_registers: Register tokens in front.
            drop_rate: Share of pooled features that training hides from the head.
            drop_path_rate: Share of pictures that training takes past the last block, below 1.

        Raises:
            ValueError: a `drop_path_rate` outside [0, 1).
        """
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} is not a share in [0, 1)")
        pixels = ModalitySpec(name=PIXELS, kind="pixels", patch_size=patch_size, is_target=False,
                              channels=in_chans, max_tokens=(img_size // patch_size) ** 2)
        config = FourMConfig(
            modalities=(pixels,), dim=embed_dim, encoder_depth=depth, decoder_depth=0,
            num_heads=num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm, bias=bias,
            gated_mlp=gated_mlp, num_register_tokens=num_registers,
        )
        super().__init__(config, num_classes=num_classes, global_pool=global_pool)
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate


def encoder_weights(released: dict[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """The encoder of a released checkpoint under the names of a backbone.

    Raises:
        ValueError: tensors that the model has and the file lacks, or the other way round.
    """
    if any(name.startswith("blocks.") for name in released):
        return released  # saved by this class
    name = model.spec.name
    renamed = {"register_tokens": "registers",
               f"encoder_embeddings.{name}.proj.weight": "patches.proj.weight",
               f"encoder_embeddings.{name}.mod_emb": "modality"}
    found = {renamed[key]: value for key, value in released.items() if key in renamed}
    for key, value in released.items():
        for old, new in (("encoder.", "blocks."), ("encoder_norm.", "norm.")):
            if key.startswith(old):
                found[new + key.removeprefix(old)] = value
    wanted = {key for key in model.state_dict() if not key.startswith("head.")}
    # Released norms without a bias keep an all-zero one in the file.
    found = {key: value for key, value in found.items()
             if key in wanted or not (key.endswith(".bias") and not value.any())}
    missing, surplus = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or surplus:
        hint = " (pass qk_norm=True)" if any(".q_norm." in key for key in surplus) else ""
        raise ValueError(f"the checkpoint's encoder is not this model's{hint}: it lacks "
                         f"{missing[:4]}, and {surplus[:4]} are surplus")
    return found


def _cfg(hub_id: str | None = None) -> dict[str, Any]:
    return {"hf_hub_id": hub_id, "hf_hub_filename": "model.safetensors" if hub_id else None,
            "num_classes": 0, "input_size": (3, 224, 224), "mean": IMAGE_MEAN, "std": IMAGE_STD,
            "interpolation": "bicubic", "crop_pct": 1.0, "first_conv": None, "classifier": "head",
            "license": "other"}


default_cfgs = generate_default_cfgs({
    "fourm_tiny_patch16_224": _cfg(),
    "fourm_small_patch16_224": _cfg(),
    **{f"fourm_{size}_patch16_224.{tag}": _cfg(f"EPFL-VILAB/4M-{number}_{letter}{data}")
       for size, letter in (("base", "B"), ("large", "L"), ("xlarge", "XL"))
       for tag, number, data in (("4m7_cc12m", 7, "_CC12M"), ("4m7_coyo700m", 7, "_COYO700M"),
                                 ("4m21", 21, ""))},
})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(
        FourMViT, variant, pretrained, pretrained_filter_fn=encoder_weights,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs,
    )


@register_model
def fourm_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """4M-Tiny's encoder: 384 wide, 6 blocks, 6 heads."""
    sizes = {"embed_dim": 384, "depth": 6, "num_heads": 6}
    return _create("fourm_tiny_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def fourm_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """4M-Small's encoder: 512 wide, 8 blocks, 8 heads."""
    sizes = {"embed_dim": 512, "depth": 8, "num_heads": 8}
    return _create("fourm_small_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def fourm_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """4M-B's encoder: 768 wide, 12 blocks, 12 heads."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("fourm_base_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def fourm_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """4M-L's encoder: 1024 wide, 24 blocks, 16 heads."""
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("fourm_large_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def fourm_xlarge_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """4M-XL's encoder: 2048 wide, 24 blocks, 32 heads."""
    sizes = {"embed_dim": 2048, "depth": 24, "num_heads": 32}
    return _create("fourm_xlarge_patch16_224", pretrained, **{**sizes, **kwargs})
