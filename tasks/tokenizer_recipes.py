"""The recipes of tokenizers, in three presets.

    scenes      the embedded world: 128 px, 64 tokens, about a minute of one core each
    modern      photographs: FSQ, so no codebook that could collapse; vision transformers
    released    the tokenizers of 4M and 4M-21 as they were trained

What is counted in epochs of ImageNet-1K there is steps here, with batches of 8 devices and a
learning rate scaled by batch / 256. `plan-tokenizers` prints parameters, tokens and cost of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args, get_type_hints

from models import modalities
from tasks.tokenizer_config import TokenizerRecipe

Preset = Literal["scenes", "modern", "released"]
_IMAGES = 1_281_167  # an epoch
_DEVICES = 8


def _released(
    epochs: int, per_device: int, base_lr: float, *, warmup_epochs: int = 5, **fields: Any
) -> TokenizerRecipe:
    batch = per_device * _DEVICES
    epoch = _IMAGES // batch
    return TokenizerRecipe(**{
        "size": 224, "width": 768, "encoder_depth": 12, "quantizer": "vq", "betas": (0.9, 0.99),
        "weight_decay": 0.05, "min_lr_ratio": 0.0, "muon": False, "max_samples": 100_000,
        "depth_mode": "standardise", "eval_every": 5000,
        "steps": epochs * epoch, "batch_size": batch, "lr": base_lr * batch / 256,
        "warmup": warmup_epochs * epoch, **fields,
    })  # fmt: skip


_UNET: dict[str, Any] = {"architecture": "unet", "decoder_depth": 3, "ema": 0.9999}
_UVIT: dict[str, Any] = {
    "architecture": "uvit", "decoder_width": 768, "decoder_depth": 2, "ema": 0.9999,
    "prediction": "v_prediction", "schedule": "shifted_cosine:0.5",
}  # fmt: skip
_VIT: dict[str, Any] = {"architecture": "vit", "decoder_depth": 12, "ema": 0.99}
_MAP: dict[str, Any] = {
    **_VIT, "kind": "feature", "codes": 8192, "loss": "smooth_l1", "min_scale": 0.2,
}  # fmt: skip
_MLP: dict[str, Any] = {
    "architecture": "mlp", "kind": "vector", "width": 1024, "encoder_depth": 6, "decoder_depth": 6,
    "latent": 1024, "groups": 16, "ema": 0.99, "min_scale": 0.2,
}  # fmt: skip
_GLOBAL: dict[str, Any] = {**_MLP, "codes": 8192, "loss": "cosine"}
_EDGE: dict[str, Any] = {**_UNET, "kind": "edge", "codes": 8192, "loss": "smooth_l1"}

_BASE = {
    "rgb": _released(50, 64, 1e-4, kind="rgb", codes=16_384, loss="mse", **_UNET),
    "rgb_1k": _released(
        50, 64, 1e-4, kind="rgb", codes=1024, loss="mse", perceptual=1.0, **_VIT
    ),
    "depth": _released(20, 64, 1e-4, kind="depth", codes=8192, loss="smooth_l1", **_UNET),
    "normal": _released(20, 64, 1e-4, kind="normal", codes=8192, loss="mse", **_UNET),
    "canny_edge": _released(50, 64, 5e-5, **_EDGE),
    "sam_edge": _released(50, 64, 5e-5, **_EDGE),
    "semseg": _released(
        20, 80, 1e-4, kind="semseg", codes=4096, num_classes=134, loss="cross_entropy", **_VIT
    ),
    "clip": _released(20, 128, 1e-4, **_MAP),
    "dinov2": _released(20, 64, 1e-4, **_MAP),
    "imagebind": _released(20, 128, 1e-4, **_MAP),
    "dinov2_global": _released(15, 64, 1e-4, **_GLOBAL),
    "imagebind_global": _released(15, 64, 1e-4, **_GLOBAL),
    "smpl_poses": _released(
        15, 64, 1e-4, warmup_epochs=1, **{**_MLP, "codes": 1024, "groups": 8,
                                          "loss": "smooth_l1", "min_scale": 0.8}
    ),
    "sam_instance": _released(
        24, 384, 1e-4, size=64, kind="mask", codes=1024, latent=1024, loss="bce", out_blocks=2,
        **{**_VIT, "ema": 0.0}
    ),
}  # fmt: skip


def _adapted(
    name: str, epochs: int, per_device: int, base_lr: float, warmup: int, spacing: int = 32
) -> TokenizerRecipe:
    """Training goes on at sides from 224 to 448 px."""
    batch = per_device * _DEVICES
    return replace(
        _BASE[name], size=448, sizes=tuple(range(224, 449, spacing)), batch_size=batch,
        steps=epochs * _IMAGES // batch, lr=base_lr * batch / 256, warmup=warmup,
    )  # fmt: skip


RELEASED: dict[str, TokenizerRecipe] = {
    **_BASE,
    "rgb_1k_divae": _released(50, 64, 1e-4, kind="rgb", codes=1024, loss="mse", **_UVIT),
    "rgb_controlnet": _released(
        10, 16, 1.6e-4, warmup_epochs=1, kind="rgb", codes=1024, loss="mse",
        architecture="controlnet", prediction="epsilon", picture=512
    ),
    "rgb_448": _adapted("rgb", 5, 16, 5e-5, warmup=_IMAGES // 128),
    "depth_448": _adapted("depth", 1, 16, 1e-4, warmup=5000),
    "normal_448": _adapted("normal", 1, 16, 5e-5, warmup=5000),
    "canny_edge_448": _adapted("canny_edge", 1, 64, 5e-5, warmup=0),
    "sam_edge_448": _adapted("sam_edge", 1, 64, 5e-5, warmup=0),
    "semseg_448": _adapted("semseg", 1, 10, 5e-5, warmup=5000, spacing=16),
    "rgb_1k_448": _adapted("rgb_1k", 1, 16, 5e-5, warmup=5000, spacing=16),
}

SCENES: dict[str, TokenizerRecipe] = {
    "rgb": TokenizerRecipe(kind="rgb", levels=(7, 5, 5, 5, 5)),
    "depth": TokenizerRecipe(kind="depth"),
    "normal": TokenizerRecipe(kind="normal"),
    "semseg": TokenizerRecipe(kind="semseg"),
    "clip": TokenizerRecipe(kind="feature"),
}


def _modern(**fields: Any) -> TokenizerRecipe:
    return TokenizerRecipe(**{
        "size": 224, "width": 768, "heads": 12, "encoder_depth": 6, "decoder_depth": 12,
        "levels": (7, 5, 5, 5, 5), "steps": 200_000, "batch_size": 256, "lr": 2e-3,
        "warmup": 2000, "ema": 0.999, "max_samples": 100_000, "eval_every": 5000, "spread": 0.3,
        **fields,
    })  # fmt: skip


_VECTOR: dict[str, Any] = {
    "kind": "vector", "groups": 16, "encoder_depth": 4, "decoder_depth": 4, "width": 512,
    "heads": 8, "levels": (8, 8, 8, 6, 5),
}  # fmt: skip
MODERN: dict[str, TokenizerRecipe] = {
    "rgb": _modern(kind="rgb", levels=(8, 8, 8, 6, 5), perceptual=1.0),
    "rgb_adaptive": _modern(kind="rgb", levels=(8, 8, 8, 6, 5), perceptual=1.0, registers=256),
    "depth": _modern(kind="depth", spread=0.7),  # of walls and floors codes hardly differ
    "normal": _modern(kind="normal"),
    "semseg": _modern(kind="semseg"),
    "canny_edge": _modern(kind="edge"),
    "sam_edge": _modern(kind="edge"),
    "clip": _modern(kind="feature"),
    "dinov2": _modern(kind="feature"),
    "imagebind": _modern(kind="feature"),
    "dinov2_global": _modern(**_VECTOR),
    "imagebind_global": _modern(**_VECTOR),
    "sam_instance": _modern(
        kind="mask", size=64, width=384, heads=6, encoder_depth=4, decoder_depth=4,
        levels=(8, 5, 5, 5),
    ),
}

PRESETS: dict[str, dict[str, TokenizerRecipe]] = {
    "scenes": SCENES, "modern": MODERN, "released": RELEASED,
}  # fmt: skip
COMMON: dict[str, dict[str, int]] = {
    "scenes": {"size": 128, "max_samples": 4000},
    "modern": {"size": 224, "max_samples": 100_000},
    "released": {"size": 224, "max_samples": 100_000},
}
"""Side of the pictures and crops to learn from that the recipes of a preset are made for."""


def tokenizer_recipe(
    name: str, preset: Preset = "scenes", named: str = "", **changes: Any
) -> TokenizerRecipe:
    """The recipe of a modality, with changes.

    Args:
        name: The modality.
        preset: Where the recipe is from.
        named: Its name there, if not the modality's: `rgb_1k` among the released ones.
        changes: Fields of the recipe.

    Raises:
        ValueError: if there is no such recipe or field, or it is of another kind of value.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: choose one of {', '.join(get_args(Preset))}")
    if name not in recipe_names():
        choices = ", ".join(recipe_names())
        raise ValueError(f"no tokenizer recipe for {name!r}; choose from {choices}")
    recipes = PRESETS[preset]
    if named and named not in recipes:
        raise ValueError(f"no recipe {named!r} in preset {preset!r}; choose from "
                         f"{', '.join(recipes)}")
    if unknown := sorted(changes.keys() - TokenizerRecipe.__dataclass_fields__.keys()):
        raise ValueError(f"a tokenizer recipe has no {unknown[0]!r}; its fields are "
                         f"{', '.join(TokenizerRecipe.__dataclass_fields__)}")
    changes = _typed(changes)
    own = modalities.get(name).tokenizer
    if (named or name) in recipes:
        found = replace(recipes[named or name], **changes)
    elif own is None:
        raise ValueError(f"preset {preset!r} has no recipe for {name!r}; it has "
                         f"{', '.join(recipes)}")
    else:
        found = TokenizerRecipe(**{**own, **changes})
    if named and found.kind != tokenizer_recipe(name, preset).kind:
        raise ValueError(f"recipe {named!r} is for {found.kind} values, not for {name}")
    return found


def _typed(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes in the types of their fields: of a list of numbers, as JSON has it, a tuple.

    Raises:
        ValueError: one is of another type, or none of its field's choices.
    """
    from pydantic import TypeAdapter, ValidationError

    kinds, found = get_type_hints(TokenizerRecipe), {}
    for name, value in changes.items():
        try:
            found[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}={value!r}: {error.errors()[0]['msg']}") from None
    return found


def recipe_names() -> list[str]:
    """Modalities with a learned tokenizer; those that bring their own recipe come last."""
    known = set(modalities.names())
    listed = [name for recipes in PRESETS.values() for name in recipes if name in known]
    own = [name for name in sorted(known) if modalities.get(name).tokenizer is not None]
    return list(dict.fromkeys([*listed, *own]))
