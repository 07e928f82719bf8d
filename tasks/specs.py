"""What a recipe asks for meets what manifests hold: specifications of modalities, masks by their
full names, and refusals that name what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.manifest import Manifest
from models import modalities
from models.fourm.catalogue import (
    SEQUENCES,
    T5_WIDTH,
    grid_spec,
    pixels_spec,
    released_spec,
    sequence_spec,
    t5_spec,
)
from models.fourm.loader import stored_name
from models.fourm.masking import Component, Mixture
from models.fourm.spec import FourMConfig, ModalitySpec

PIXELS = "rgb"
EMBEDDED = "t5_caption"
_OWN_LENGTH = ("caption", "det")
"""Sequences whose longest text is the recipe's choice; others are as long as released."""


def modality_specs(manifest: Manifest, *, max_text: int) -> tuple[ModalitySpec, ...]:
    """The modalities a manifest offers, as a model sees them.

    Args:
        manifest: A published token set.
        max_text: Longest caption or box list in tokens, [EOS] included.

    Raises:
        ValueError: a modality has no tokenizer in the manifest.
    """
    specs = [_spec(manifest, name, max_text) for name in sorted(manifest.modalities)]
    if PIXELS in manifest.modalities:
        specs += [pixels_spec(PIXELS, size) for size in _further_sizes(manifest)]
    return tuple(specs)


def _further_sizes(manifest: Manifest) -> list[int]:
    """Sides in pixels of the token sets that a manifest holds beside its own."""
    return sorted({int(name.partition("@")[2]) for name in manifest.modalities if "@" in name})


def _spec(manifest: Manifest, name: str, max_text: int) -> ModalitySpec:
    if name == EMBEDDED:
        # Of the released width and number unless the manifest says how its vectors were made.
        made = manifest.tokenizers.get(name, {})
        return t5_spec(name, int(made.get("channels", T5_WIDTH)), made.get("num_tokens"))
    if name == PIXELS:
        return pixels_spec(name, _size(manifest))
    key = tokenizer_key(name)
    if key not in manifest.tokenizers:
        raise ValueError(f"{manifest.name} v{manifest.version} names no tokenizer of {name}; "
                         f"it has {', '.join(sorted(manifest.tokenizers))}")
    vocab = int(manifest.tokenizers[key]["vocab_size"])
    if _is_text(name):
        return sequence_spec(name, vocab, max_text if name in _OWN_LENGTH else None)
    made = manifest.tokenizers[key]
    base, _, size = name.partition("@")
    return grid_spec(base, int(size or _size(manifest)), vocab, int(made["num_tokens"]),
                     ordered=bool(made.get("ordered", False)))


def tokenizer_key(name: str) -> str:
    """Entry of a manifest's tokenizers that made the tokens of a modality."""
    return "text" if _is_text(name) else name.removeprefix("tok_")


def _is_text(name: str) -> bool:
    """Whether tokens of that name are words: of the released sequences, or of a modality that a
    package adds."""
    return name in SEQUENCES or modalities.text_form(name) is not None


def _size(manifest: Manifest) -> int:
    return int(manifest.meta["crops"]["size"])


def released_specs(names: Sequence[str]) -> tuple[ModalitySpec, ...]:
    """The modalities `names` as the released models have them."""
    return tuple(released_spec(name) for name in names)


def chosen_specs(
    offered: Sequence[ModalitySpec], wanted: Sequence[str], predicts: Sequence[str], where: str
) -> tuple[ModalitySpec, ...]:
    """Those of `offered` that a recipe wants, inputs only where it does not predict them.

    Args:
        offered: Specifications of a set.
        wanted: Names with or without resolution, which is the set's own then; none: all.
        predicts: Names of targets; none: all that can be.
        where: What the set is called in errors.

    Raises:
        ValueError: something wanted is not offered; names it and what there is.
    """
    missing = [name for name in wanted if not any(_is(name, spec) for spec in offered)]
    if missing:
        have = ", ".join(sorted(spec.name for spec in offered))
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {have}")
    own = own_names(offered)
    named = {own.get(name, name) for name in wanted}
    kept = [spec for spec in offered if not wanted or spec.name in named]
    return tuple(
        replace(s, is_target=False)
        if predicts and s.is_target and not any(_is(name, s) for name in predicts) else s
        for s in kept
    )


def own_names(offered: Sequence[ModalitySpec]) -> dict[str, str]:
    """Name without resolution -> full name of what a set has at its own, which comes first."""
    return {stored_name(spec.name): spec.name for spec in reversed(offered)}


def _is(name: str, spec: ModalitySpec) -> bool:
    return name in (spec.name, stored_name(spec.name))


def resolve(
    mixture: Mixture, config: FourMConfig, names: Collection[str] | None = None
) -> Mixture:
    """Expands base names and "*" (all others) of a mixture to the modalities of a model.

    Args:
        mixture: Masks.
        config: The model.
        names: Modalities that the samples have; all of the model's unless given.

    Raises:
        ValueError: a modality is unknown, or a component asks for more tokens than its modalities
            can ever hold.
    """
    held = set(config.by_name if names is None else names)
    parts = []
    for component in mixture.components:
        inputs = _expand(component.inputs, [s for s in config.inputs if s.name in held])
        targets = _expand(component.targets, [s for s in config.targets if s.name in held])
        least = _expand(component.least, [s for s in config.inputs if s.name in inputs])
        parts.append(Component(**{**vars(component), "inputs": inputs, "targets": targets,
                                  "least": least}))
        _check_room(config, parts[-1])
    return Mixture(components=tuple(parts), per_batch=mixture.per_batch)


def _check_room(config: FourMConfig, part: Component) -> None:
    """Raises ValueError for numbers of tokens that no batch can have."""
    room = {name: config.by_name[name].max_tokens for name in {*part.inputs, *part.targets}}
    shown, asked = part.num_inputs[0], part.num_targets[0]
    for kind, chosen, least in (("input", part.inputs, shown), ("target", part.targets, asked)):
        space = sum(room[name] for name in chosen)
        if least > space:
            raise ValueError(f"no batch can hold {least} {kind} tokens of "
                             f"{', '.join(chosen) or 'no modality'}: "
                             f"together they have {space}; lower num_{kind}s")
    # A place of a grid that is shown is not predicted; texts have sentinels in place of words.
    grids = {name for name in part.targets if config.by_name[name].kind == "img"}
    taken = shown - sum(room[name] for name in part.inputs if name not in grids)
    left = sum(room[name] for name in part.targets) - max(0, taken)
    if asked > left:
        raise ValueError(f"no batch can hold {asked} target tokens of {', '.join(part.targets)} "
                         f"beside {shown} input tokens of {', '.join(part.inputs)}: {left} are "
                         "left; lower num_targets or num_inputs")
    for name, count in part.least.items():
        if count > room[name]:
            raise ValueError(f"no batch can hold {count} input tokens of {name}: it has "
                             f"{room[name]}; lower its least")
    least = sum(part.least.values())
    if least > part.num_inputs[1]:
        raise ValueError(f"no batch can hold the least of {', '.join(part.least)}: {least} input "
                         f"tokens of at most {part.num_inputs[1]}; raise num_inputs")


def _expand(alphas: Mapping[str, float], specs: Sequence[ModalitySpec]) -> dict[str, Any]:
    """Full name -> concentration or least budget; a base name stands for all of its resolutions."""
    unknown = sorted(name for name, alpha in alphas.items() if name != "*" and alpha > 0
                     and not any(_is(name, spec) for spec in specs))
    if unknown:
        bases = sorted({stored_name(spec.name) for spec in specs})
        raise ValueError(f"the mixture names {', '.join(unknown)}; choose from "
                         f"{', '.join(bases)} or * (the recipe 'any' takes what there is)")
    found = {}
    for spec in specs:
        alpha = alphas.get(spec.name, alphas.get(stored_name(spec.name), alphas.get("*", 0.0)))
        if alpha > 0:
            found[spec.name] = alpha
    return found
