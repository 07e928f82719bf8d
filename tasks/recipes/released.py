"""The released 4M runs as recipes: same networks, masks, budgets, batches and learning rates.

Published: 4M-7 and 4M-21 in B, L and XL, text-to-image in B, L and XL, super-resolution in L.
Scores are those of the papers (arXiv 2312.06647, 2406.09406) for the released weights; nothing
here was trained by this project. Costs in A100-hours are the papers' for the runs they state, else
a bound by arithmetic: `fourm plan-train --recipe NAME` prints parameters, memory, FLOPs and hours.

    fourm plan-train --recipe fourm_b --devices 64
    fourm train --recipe fourm_b --root s3://bucket/cc12m --manifest main --train-workers 64
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.fourm.masking import Component, Mixture
from tasks.recipes.base import Source, TrainRecipe
from tasks.train_config import TrainConfig

GRIDS = ("tok_clip", "tok_depth", "tok_normal", "tok_rgb", "tok_semseg")
SEVEN = ("caption", "det", "rgb", *GRIDS)
"""4M-7: seven token modalities, and the pixels they were made from as an eighth input."""
TWENTY_ONE = (
    *SEVEN, "color_palette", "human_poses", "metadata", "sam_instance", "t5_caption",
    "tok_canny_edge", "tok_dinov2", "tok_dinov2_global", "tok_imagebind", "tok_imagebind_global",
    "tok_sam_edge",
)
SR_SIZES = ("@224", "@448")
SR_MODALITIES = (
    "caption", "det", *(name + size for size in SR_SIZES for name in ("rgb", *GRIDS)),
)
_BASE = {"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12}
_LARGE = {"dim": 1024, "encoder_depth": 24, "decoder_depth": 24, "num_heads": 16}
_XLARGE = {"dim": 2048, "encoder_depth": 24, "decoder_depth": 24, "num_heads": 32}
_BLR, _BLR_XL = 1e-4, 2e-5
_PATCHES = 196
_EPOCH = 10_000_000  # samples between two evaluations of the released runs


def _training(
    *, tokens: float, slots: int, batch: int, blr: float = _BLR, warmup: float = 10e9,
    clip: float = 3.0,
) -> TrainConfig:
    """Settings for a budget of `tokens` (`slots` input and target slots a sample count), with the
    learning rate `blr` for each 256 samples of a batch."""
    return TrainConfig(
        steps=round(tokens / (slots * batch)), batch_size=batch, lr=blr * batch / 256,
        warmup_steps=round(warmup / (slots * batch)), clip_norm=clip, checkpoint_seconds=1800.0,
        eval_every=round(_EPOCH / batch),
    )


def _even(alpha: float, slots: int) -> Component:
    """Anything to anything."""
    return Component(inputs={"*": alpha}, targets={"*": alpha}, num_inputs=(slots, slots),
                     num_targets=(slots, slots))


def _from_pixels(slots: int) -> Component:
    """Patches to anything: all there are, where the budget is larger than a picture."""
    seen = min(slots, _PATCHES)
    return Component(inputs={"rgb": 1000.0}, targets={"*": 0.5}, num_inputs=(seen, seen),
                     num_targets=(slots, slots))


def _biased(name: str, slots: int) -> Component:
    """Much of one text, whole, and little of the rest; to everything but this text."""
    return Component(inputs={name: 5.0, "*": 0.05}, targets={name: 0.0, "*": 0.5}, keep="all",
                     num_inputs=(slots, slots), num_targets=(slots, slots), weight=0.5)


def _all_alphas(slots: int) -> tuple[Component, ...]:
    spread = (_even(alpha, slots) for alpha in (0.01, 0.1, 1.0, 10.0))
    return (*spread, _from_pixels(slots), _biased("caption", slots))


def _seven(network: dict[str, Any], **training: Any) -> TrainRecipe:
    return TrainRecipe(
        network=network, modalities=SEVEN, repeats=4,
        mixture=Mixture(components=(_even(0.5, 128), _from_pixels(128))),
        training=_training(tokens=500e9, slots=256, batch=8192, **training),
    )


def fourm_b() -> TrainRecipe:
    """4M-7 B: 198 M parameters without embeddings, 500 B tokens in 238 k steps.

    Cost: 64 A100 for two days. Scores: DIODE normals 21.9°, depth L1 0.71, COCO semantic
    segmentation 43.3 mIoU (ten samples each); ImageNet-1K fine-tuned 84.5 %.
    Command: fourm train --recipe fourm_b --train-workers 64
    """
    return _seven(_BASE, clip=1.0)


def fourm_l() -> TrainRecipe:
    """4M-7 L: 705 M parameters without embeddings, 500 B tokens.

    Cost: 128 A100 for four days. Scores: DIODE normals 21.5°, depth L1 0.69, COCO semantic
    segmentation 47.2 mIoU (ten samples each); ImageNet-1K fine-tuned 86.6 %.
    Command: fourm train --recipe fourm_l --train-workers 128
    """
    return _seven(_LARGE)


def fourm_xl() -> TrainRecipe:
    """4M-7 XL: 2.8 B parameters without embeddings, 500 B tokens, a fifth of the learning rate.

    Cost: 128 A100 for eleven days. Scores: DIODE normals 20.6°, depth L1 0.69, COCO semantic
    segmentation 48.1 mIoU (ten samples each); ImageNet-1K fine-tuned 87.0 %.
    Command: fourm train --recipe fourm_xl --train-workers 128
    """
    return _seven(_XLARGE, blr=_BLR_XL)


def _twenty_one(network: dict[str, Any], seven: str, **training: Any) -> TrainRecipe:
    """CC12M with all modalities, COYO with those of 4M-7 and C4 with text alone, 6 : 2 : 2.

    The papers state batches of 8192, the released configurations 4096; this takes the papers'.
    """
    text = Mixture(components=(_even(1.0, 256),))
    full = Mixture(components=(*_all_alphas(256), _biased("t5_caption", 256)))
    return TrainRecipe(
        network=network, modalities=TWENTY_ONE, repeats=4, starts_from=seven, mixture=full,
        sources=(
            Source(name="cc12m", weight=0.6, mixture=full),
            Source(name="coyo", weight=0.2, mixture=Mixture(components=_all_alphas(256)),
                   modalities=SEVEN),
            Source(name="c4", weight=0.2, mixture=text, modalities=("caption",)),
        ),
        training=_training(tokens=500e9, slots=512, batch=8192, **training),
    )


def fourm_21_b() -> TrainRecipe:
    """4M-21 B: starts from 4M-7 B, 500 B tokens of CC12M, COYO and C4.

    Cost: 3,072 A100-hours (64 for two days). Scores: DIODE normals 21.7°, depth L1 0.71, COCO
    semantic segmentation 42.5 mIoU (ten samples each), ImageNet-1K nearest neighbours 73.1 %,
    3DPW poses 108.3 mm.
    Command: fourm train --recipe fourm_21_b --start RUN --train-workers 64
    --data '{"cc12m": "main", "coyo": "s3://bucket/coyo#main", "c4": "s3://bucket/c4#main"}'
    """
    return _twenty_one(_BASE, "fourm_b", clip=1.0)


def fourm_21_l() -> TrainRecipe:
    """4M-21 L: starts from 4M-7 L, 500 B tokens of CC12M, COYO and C4.

    Cost: 12,288 A100-hours (128 for four days). Scores: DIODE normals 21.1°, depth L1 0.69, COCO
    semantic segmentation 46.4 mIoU (ten samples each), ImageNet-1K nearest neighbours 77.0 %,
    3DPW poses 97.4 mm.
    Command: that of `fourm_21_b` with --recipe fourm_21_l --train-workers 128
    """
    return _twenty_one(_LARGE, "fourm_l")


def fourm_21_xl() -> TrainRecipe:
    """4M-21 XL: starts from 4M-7 XL, 500 B tokens of CC12M, COYO and C4.

    Cost: 33,792 A100-hours (128 for eleven days). Scores: DIODE normals 20.8°, depth L1 0.68, COCO
    semantic segmentation 48.1 mIoU (ten samples each), ImageNet-1K nearest neighbours 78.3 %,
    3DPW poses 92.0 mm.
    Command: that of `fourm_21_b` with --recipe fourm_21_xl --train-workers 128
    """
    return _twenty_one(_XLARGE, "fourm_xl", blr=_BLR_XL)


def _text_to_image(seven: TrainRecipe, name: str, **training: Any) -> TrainRecipe:
    slots: dict[str, Any] = {"num_inputs": (64, 256), "num_targets": (256, 256)}
    words = Component(inputs={"caption": 5.0, "*": 0.05}, targets={"*": 1.0}, keep="all", **slots)
    even = (Component(inputs={"*": alpha}, targets={"*": 1.0}, **slots) for alpha in (0.2, 1.0))
    return replace(
        seven, starts_from=name, mixture=Mixture(components=(words, *even)),
        training=_training(tokens=100e9, slots=512, **training),
    )


def t2i_b() -> TrainRecipe:
    """4M-7 B turned to generation from captions: starts from 4M-7 B, 100 B tokens.

    Cost: 32 A100; hours are not published. Scores: none published beside pictures.
    Command: fourm train --recipe t2i_b --start RUN --train-workers 32
    """
    return _text_to_image(fourm_b(), "fourm_b", batch=4096, clip=1.0)


def t2i_l() -> TrainRecipe:
    """4M-7 L turned to generation from captions: starts from 4M-7 L, 100 B tokens.

    Cost: 128 A100; hours are not published. Scores: none published beside pictures.
    Command: fourm train --recipe t2i_l --start RUN --train-workers 128
    """
    return _text_to_image(fourm_l(), "fourm_l", batch=8192)


def t2i_xl() -> TrainRecipe:
    """4M-7 XL turned to generation from captions: starts from 4M-7 XL, 100 B tokens.

    Cost: 128 A100; hours are not published. Scores: none published beside pictures.
    Command: fourm train --recipe t2i_xl --start RUN --train-workers 128
    """
    return _text_to_image(fourm_xl(), "fourm_xl", batch=4096, blr=_BLR_XL)


def sr_l() -> TrainRecipe:
    """Super-resolution: 4M-7 L learns the tokens of 448 px from those of 224 px, 100 B tokens.

    The data are tokenized at both sizes (`fourm tokenize --sizes 224,448`). Token vectors of 448 px
    begin as those of 224 px, whose codes they share; the released run drew them anew.
    Cost: 128 A100; hours are not published. Scores: none published beside pictures.
    Command: fourm train --recipe sr_l --start RUN --train-workers 128
    """
    low, high = SR_SIZES
    fine = tuple(name + high for name in GRIDS)
    slots: dict[str, Any] = {"num_inputs": (64, 1024), "num_targets": (1024, 1024)}
    first = f"tok_rgb{high}"
    pictures = Component(inputs={f"tok_rgb{low}": 5.0, first: 5.0, "*": 0.05},
                         targets={first: 5.0, "*": 0.05}, **slots)
    words = Component(inputs={"caption": 5.0, "*": 0.05}, targets={"*": 1.0}, keep="all", **slots)
    even = (Component(inputs={"*": alpha}, targets={"*": 1.0}, **slots) for alpha in (0.2, 1.0))
    return TrainRecipe(
        network=_LARGE, modalities=SR_MODALITIES, predicts=fine, repeats=4, starts_from="fourm_l",
        inherit={name + high: name + low for name in ("rgb", *GRIDS)},
        mixture=Mixture(components=(pictures, words, *even)),
        training=_training(tokens=100e9, slots=2048, batch=4096, warmup=5e9),
    )
