"""How released 4M models are sampled: the defaults of their published sampler, and others by name.

The table has a column for targets of an RGB picture and one for all others. Guidance is constant
and grows: finished targets are conditions, and guide, like the ones that were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from models.fourm.decoding import Decoding
from models.fourm.grammar import GRAMMARS
from models.fourm.spec import ModalitySpec

Preset = Literal["plain", "released", "halton", "greedy"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
_HALTON_STEPS = 16
_OF_GRIDS = ("order", "steps", "schedule", "temperature_schedule", "remask")
_OF_SEQUENCES = ("well_formed",)

_TOP_P = 0.8
_COOLING = "onex:0.5:0.5"
_WORDS = {"caption": 0.3, "det": 0.3, "sam_instance": 0.01}
"""Temperatures of sequences; those of all others are 0.1."""

TARGET_ORDER = (
    "clip", "dinov2", "imagebind", "depth", "normal", "semseg", "canny_edge", "sam_edge", "rgb",
    "caption", "det", "human_poses", "sam_instance", "color_palette", "metadata",
)  # fmt: skip
"""The order in which the released sampler generates several targets."""
UPSCALE_ORDER = ("clip", "depth", "normal", "semseg", "rgb")
"""The order of its super-resolution stage."""


def base_name(name: str) -> str:
    """Catalogue name of a model's modality: "tok_depth@128" is "depth"."""
    return name.split("@")[0].removeprefix("tok_")


def resolution(name: str) -> int:
    """Side in pixels that a modality's name states, 0 if none: 448 of "tok_depth@448"."""
    side = name.partition("@")[2]
    return int(side) if side.isdigit() else 0


def default_decoding(spec: ModalitySpec, given: Iterable[str]) -> Decoding:
    """The released sampler's settings for a target, given the model's names of its conditions."""
    names, name = list(given), base_name(spec.name)
    if spec.kind == "seq":
        return Decoding(
            order="autoregressive", temperature=_WORDS.get(name, 0.1), top_p=_TOP_P,
            show_opening=True,
        )  # fmt: skip
    if is_upscaled(spec, names):
        return Decoding(order="maskgit", steps=8, top_p=_TOP_P, guidance=2.0)
    if name.endswith("_global"):
        return _roar(spec, steps=1, temperature=0.1, guidance=1.0)
    if any(base_name(other) == "rgb" for other in names):
        return _roar(spec, steps=1, temperature=0.01)
    if name in ("dinov2", "imagebind"):
        return _roar(spec, steps=8, temperature=0.01)
    if name == "clip":
        return _roar(spec, steps=50, temperature=5.0, cooling=_COOLING, guidance=3.0)
    steps = 25 if name == "rgb" else 8
    return _roar(spec, steps=steps, temperature=3.0, cooling=_COOLING)


def preset(name: Preset, spec: ModalitySpec, given: Iterable[str]) -> Decoding:
    """Settings for a target by one word.

    Args:
        name: "released" is the published sampler; "plain" the same without guidance, which needs a
            training that often hides conditions, and with boxes, palettes and the like always well
            formed; "halton" is plain with grids in 16 evenly spread steps; "greedy" is plain and
            takes the most likely token, whatever the seed.
        spec: The target.
        given: As for `default_decoding`.

    Raises:
        ValueError: there is no such preset; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    found = default_decoding(spec, given)
    if name == "released":
        return found
    sequence = spec.kind == "seq"
    found = replace(found, guidance=1.0, show_opening=False,
                    well_formed=sequence and base_name(spec.name) in GRAMMARS)  # fmt: skip
    if name == "greedy":
        return replace(found, temperature=0.0, temperature_schedule="constant")
    if name == "halton" and not sequence:
        steps = min(_HALTON_STEPS, spec.max_tokens)
        return replace(found, order="halton", schedule="linear", steps=steps)
    return found


def changed(
    decoding: Decoding, spec: ModalitySpec, changes: Mapping[str, Any], *, all_targets: bool
) -> Decoding:
    """Settings of a target with some of them replaced.

    Args:
        decoding: The settings.
        spec: The target.
        changes: Field of `Decoding` -> its value.
        all_targets: Whether the changes are meant for every target, and those that only concern
            the other kind are left out; else they are refused.

    Raises:
        ValueError: a field that means nothing for this target.
    """
    foreign = _OF_GRIDS if spec.kind == "seq" else _OF_SEQUENCES
    odd = [field for field in changes if field in foreign]
    if odd and not all_targets:
        kind = "a sequence" if spec.kind == "seq" else "a grid"
        raise ValueError(f"{base_name(spec.name)} is {kind}: {', '.join(odd)} mean nothing for it")
    return replace(decoding, **{k: v for k, v in changes.items() if k not in odd})


def _roar(
    spec: ModalitySpec, *, steps: int, temperature: float, cooling: str = "constant",
    guidance: float = 2.0,
) -> Decoding:  # fmt: skip
    return Decoding(
        order="roar", steps=min(steps, spec.max_tokens), schedule="linear",
        temperature=temperature, temperature_schedule=cooling, top_p=_TOP_P, guidance=guidance,
    )  # fmt: skip


def is_upscaled(spec: ModalitySpec, given: Sequence[str]) -> bool:
    """Whether a target is to be made from tokens of its own at a lower resolution."""
    return any(
        base_name(name) == base_name(spec.name) and 0 < resolution(name) < resolution(spec.name)
        for name in given
    )
