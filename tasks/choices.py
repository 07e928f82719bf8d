"""What flows were told, as the specifications of stages: of downloads, labelers and tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.labelers.base import LabelerSpec
    from tasks.fetch import FetchConfig
    from tasks.tokenizer_config import TokenizerRecipe

_FILTERS = ("min_side", "max_pixels", "max_aspect")  # which older datasets lack


def fetch_config(choices: dict[str, Any]) -> FetchConfig:
    """Download settings out of the choices of the ingest flow."""
    from infra.addresses import AddressPolicy
    from infra.download import DownloadPolicy
    from tasks.fetch import FetchConfig
    from tasks.pictures import PicturePolicy

    names = ("timeout", "attempts", "concurrency", "per_host", "honour_opt_out", "honour_robots")
    return FetchConfig(
        pictures=PicturePolicy(
            resize=choices["resize"],
            size=choices["image_size"],
            **{name: choices[name] for name in _FILTERS if name in choices},
        ),
        downloads=DownloadPolicy(
            **{name: choices[name] for name in names if name in choices},
            addresses=AddressPolicy(frozenset(choices["allow_hosts"])),
        ),
    )


def labelers(choices: dict[str, Any]) -> dict[str, LabelerSpec]:
    """Specifications out of the choices of the label flow."""
    from models.labelers import preset

    specs = preset(choices["preset"])
    missing = [name for name in choices["labelers"] if name not in specs]
    if missing:
        raise ValueError(
            f"preset {choices['preset']!r} has no labeler {missing[0]!r}; it has {', '.join(specs)}"
        )
    names = ("batch_size", "precision", "device")
    changes = {name: choices[name] for name in names if choices.get(name) is not None}
    chosen = {name: dataclasses.replace(specs[name], **changes) for name in choices["labelers"]}
    for name, model in choices.get("models", {}).items():
        if name not in chosen:
            raise ValueError(f"models names {name!r}; the labelers are {', '.join(chosen)}")
        model_id, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
        chosen[name] = dataclasses.replace(chosen[name], model_id=model_id, revision=revision)
    for name, own in choices.get("resources", {}).items():
        if name not in chosen:
            raise ValueError(f"resources names {name!r}; the labelers are {', '.join(chosen)}")
        if own["batch_size"]:
            chosen[name] = dataclasses.replace(chosen[name], batch_size=own["batch_size"])
        if own.get("compile"):  # which older datasets lack
            chosen[name] = dataclasses.replace(chosen[name], compile=True)
    return chosen


def tokenizer_recipes(choices: dict[str, Any]) -> dict[str, TokenizerRecipe]:
    """Recipes out of the choices of the tokenizer flow."""
    for field in ("changes", "recipes"):
        if unknown := choices.get(field, {}).keys() - set(choices["modalities"]):
            raise ValueError(f"{field} names {min(unknown)!r}, which is not among the modalities")
    return {name: chosen_recipe(name, choices) for name in choices["modalities"]}


def chosen_recipe(name: str, choices: dict[str, Any]) -> TokenizerRecipe:
    """Recipe of a modality out of the choices of the tokenizer flow."""
    from tasks.tokenizer_recipes import tokenizer_recipe

    named = choices.get("preset", "scenes"), choices.get("recipes", {}).get(name, "")
    common = {
        field: choices[field] for field in ("size", "max_samples", "steps") if choices.get(field)
    }
    if tokenizer_recipe(name, *named).kind == "mask":
        common.pop("size", None)  # masks are patches of their own size
    return tokenizer_recipe(name, *named, **{**common, **choices["changes"].get(name, {})})
