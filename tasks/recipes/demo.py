"""Recipes that run on a laptop: the demo's and the speedrun's."""

from __future__ import annotations

from dataclasses import replace

from models.fourm.masking import Component, Mixture
from tasks.recipes.base import TrainRecipe
from tasks.train_config import TrainConfig

# What a target weighs in the demo. Grids whose labels are measured go first; a picture's own codes
# are hard to predict even with the picture in view, and teach little about anything else.
_FROM_PIXELS = {
    "tok_depth": 1.0, "tok_normal": 1.0, "tok_semseg": 1.0, "tok_clip": 0.15, "tok_rgb": 0.1,
    "caption": 4.0, "det": 4.0,
}
_FROM_WORDS = {
    "tok_rgb": 2.0, "tok_depth": 1.0, "tok_normal": 1.0, "tok_semseg": 1.0, "tok_clip": 0.1,
}


def demo(steps: int = 1350) -> TrainRecipe:
    """4M-7 in about 15 minutes on two cores with fast bf16, for scenes of 128 px.

    Two batches of three go from pixels to all labels, the rest is shared by captions to pictures,
    boxes to pictures, and anything to anything.
    """
    return TrainRecipe(
        network={"dim": 256, "encoder_depth": 5, "decoder_depth": 2, "num_heads": 4,
                 "mlp_ratio": 3.0, "tie_embeddings": False, "token_std": 0.5},
        mixture=Mixture(components=(
            Component(weight=6, inputs={"rgb": 1.0}, num_inputs=(64, 64),
                      targets=_FROM_PIXELS, num_targets=(128, 128)),
            Component(weight=1, inputs={"caption": 1.0}, keep="all", num_inputs=(40, 40),
                      targets={**_FROM_WORDS, "det": 4.0}, num_targets=(96, 96)),
            Component(weight=1, inputs={"det": 1.0}, keep="all", num_inputs=(32, 32),
                      targets={**_FROM_WORDS, "caption": 4.0}, num_targets=(96, 96)),
            Component(weight=1, inputs={"*": 0.5}, num_inputs=(80, 80),
                      targets={"*": 0.5}, num_targets=(96, 96)),
        ), per_batch=True),
        training=TrainConfig(steps=steps, batch_size=64, lr=4e-3, warmup_steps=80,
                             min_lr_ratio=0.02),
        max_text=64,
        muon=True,
    )


def whatever_there_is(steps: int = 1350) -> TrainRecipe:
    """The network of `demo` for any labels, your own modalities among them: half of the batches go
    from pixels to all that the set holds, half from anything to anything.

    Command: fourm train --recipe any
    """
    return replace(demo(steps), mixture=Mixture(components=(
        Component(weight=1, inputs={"rgb": 1.0}, num_inputs=(64, 64),
                  targets={"*": 1.0}, num_targets=(64, 64)),
        Component(weight=1, inputs={"*": 0.5}, num_inputs=(64, 64),
                  targets={"*": 0.5}, num_targets=(64, 64)),
    ), per_batch=True))


def demo_12(steps: int = 1500) -> TrainRecipe:
    """The network of `demo` for twelve modalities of scenes: about 17 minutes on the same cores.

    Pixels to the labels of 4M-7 keep nearly as many batches as `demo` gives them; one in eight goes
    from pixels to all others, one in eight from any modality, mostly a single one, to any.
    """
    base = demo(steps)
    rest = {"tok_canny_edge": 1.0, "tok_dinov2": 0.4, "tok_dinov2_global": 2.0, "tok_clip": 0.3,
            "color_palette": 3.0, "metadata": 3.0}
    pixels, words, boxes, _ = base.mixture.components
    return replace(base, mixture=Mixture(components=(
        pixels,
        Component(weight=1.25, inputs={"rgb": 1.0}, num_inputs=(64, 64), targets=rest,
                  num_targets=(112, 112)),
        replace(words, targets={**words.targets, "tok_dinov2_global": 1.0}),
        replace(boxes, weight=0.5, targets={**boxes.targets, "tok_dinov2_global": 1.0}),
        Component(weight=1.25, inputs={"*": 0.1}, num_inputs=(64, 64),
                  targets={"*": 0.5, "tok_dinov2_global": 1.0}, num_targets=(112, 112)),
    ), per_batch=True))


def speedrun(steps: int = 540) -> TrainRecipe:
    """The entry of `fourm speedrun`: the demo's network from pixels to everything. Two cores with
    fast bf16 reach the target after 300 steps, in 200 seconds.

    Command: fourm speedrun --record --note "what became faster"
    """
    targets = {"tok_depth": 1.0, "tok_normal": 1.0, "tok_semseg": 1.0, "tok_rgb": 1.0,
               "caption": 2.0, "det": 2.0}
    base = demo(steps)
    return replace(
        base,
        mixture=Mixture(components=(
            Component(inputs={"rgb": 1.0}, num_inputs=(64, 64), targets=targets,
                      num_targets=(128, 128)),
        ), per_batch=True),
        training=replace(base.training, warmup_steps=60, log_every=25, eval_every=25),
    )
