"""Training that begins with a finished model: its tensors, new modalities beside them, parts that
stay as they are, low-rank updates.

Names are the published ones of `models.fourm.checkpoint`, for patterns and in errors. The result
is an ordinary model again: updates are merged before it is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tasks.frozen import hold_rows
from tasks.recipes import Lora, TrainRecipe

if TYPE_CHECKING:
    import torch

    from infra.store import Store
    from models.fourm.model import FourM

logger = logging.getLogger("fourm.train")

_LISTED = 8
_NETWORK = ("dim", "encoder_depth", "decoder_depth", "num_heads", "gated_mlp", "bias", "qk_norm",
            "share_modality_embeddings", "tie_embeddings", "num_register_tokens")
"""Settings of two networks that must agree for one to continue the other; the rest shows in the
shapes of tensors."""


def read_start(store: Store, start: str) -> FourM:
    """The model that a training begins with.

    Args:
        store: The dataset.
        start: A run of it, or what `models.fourm.checkpoint.load` opens.

    Raises:
        ValueError: there is neither, or the files are no checkpoint.
    """
    from models.fourm.checkpoint import load, load_stored
    from tasks.generate import MODEL, runs

    known = runs(store)
    if start in known:
        return load_stored(store, f"runs/{start}/{MODEL}")
    try:
        return load(start)
    except FileNotFoundError as error:
        raise ValueError(f"cannot begin with {start!r}: it is no finished run of {store.url} "
                         f"(there are: {', '.join(known) or 'none'}), nor a checkpoint "
                         f"({error})") from error


def graft(
    model: FourM, source: FourM, inherit: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Copies the tensors of `source` into `model`, which may have other modalities.

    Position tables that are computed are left alone, so pictures may have another size.

    Args:
        model: A fresh network, or one on the meta device, of which only the shapes are checked.
        source: The model to begin with.
        inherit: New modality -> modality of `source` whose token vectors it takes.

    Returns:
        Modalities of `model` that are not in `source`, sorted: their embeddings stay fresh, but
        for what they inherit.

    Raises:
        ValueError: networks differ, or tensors are missing or misshapen; names them all, or the
            first few and how many there are.
    """
    import torch

    _check_networks(model, source)
    known = {spec.name for spec in source.config.modalities}
    fresh = sorted(spec.name for spec in model.config.modalities if spec.name not in known)
    origin = _origins(inherit or {}, set(fresh), known)
    have, problems = _tensors(source), []
    with torch.no_grad():
        for name, own in _tensors(model).items():
            modality = modality_of(name)
            if modality in fresh and modality not in origin:
                continue
            other = name if modality not in fresh else name.replace(modality, origin[modality])
            if other not in have:
                # Something new of a known modality: it was an input only, say, and is predicted.
                if modality in fresh:
                    continue
                problems.append(f"{other} is missing")
            elif have[other].shape != own.shape:
                problems.append(f"{other} has shape {tuple(have[other].shape)}, the recipe asks "
                                f"for {tuple(own.shape)}")
            elif not own.is_meta:
                own.copy_(have[other])
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"the checkpoint does not fit: {'; '.join(problems[:_LISTED])}{more}")
    return tuple(fresh)


def modality_of(name: str) -> str:
    """The modality that a published tensor belongs to; empty for those of the blocks."""
    head, _, rest = name.partition(".")
    if head not in ("encoder_embeddings", "decoder_embeddings"):
        return ""
    for tail in (".token_emb.", ".to_logits.", ".proj.", ".emb_proj.", ".mod_emb", ".pos_emb"):
        place = rest.find(tail)
        if place > 0:
            return rest[:place]
    raise ValueError(f"{name} is no published name of an embedding")


def _check_networks(model: FourM, source: FourM) -> None:
    differ = [f"{key} is {getattr(source.config, key)}, the recipe's {getattr(model.config, key)}"
              for key in _NETWORK if getattr(source.config, key) != getattr(model.config, key)]
    if differ:
        raise ValueError(f"the checkpoint is of another network: its {'; its '.join(differ)}")


def _origins(inherit: Mapping[str, str], fresh: set[str], known: set[str]) -> dict[str, str]:
    """The modality that each fresh one inherits from, where the checkpoint has it."""
    odd = sorted(set(inherit.values()) - known)
    if odd:
        raise ValueError(f"modalities cannot inherit from {', '.join(odd)}: the checkpoint has "
                         f"{', '.join(sorted(known))}")
    return {new: old for new, old in inherit.items() if new in fresh}


def _tensors(model: FourM) -> dict[str, torch.Tensor]:
    """Published name -> the part of the model's own tensors that it stands for."""
    from models.fourm.checkpoint import to_released

    own = {id(parameter) for parameter in model.parameters()}
    kept = {}
    for name, value in to_released(model).items():
        modality = modality_of(name)
        spec = model.config.by_name.get(modality)
        computed = spec is not None and name.endswith(".pos_emb") and not spec.learned_positions
        # Inputs of grids inside the decoder are not used; zeros stand in for biases of norms.
        unused = (spec is not None and spec.kind == "img" and name.startswith("decoder")
                  and ".token_emb." in name)
        stand_in = spec is None and id(value) not in own
        if not (computed or unused or stand_in):
            kept[name] = value
    return kept


def tune(model: FourM, recipe: TrainRecipe, fresh: Sequence[str]) -> FourM:
    """Freezes what the recipe freezes and adds its low-rank updates. `fresh` modalities are never
    frozen by low-rank training. Returns the model.

    Raises:
        ValueError: as `check_tuning`.
    """
    frozen = check_tuning(model, recipe)
    if recipe.lora:
        names = _tensors(model)
        frozen |= {name for name in names if modality_of(name) not in fresh}
    if frozen:
        _freeze(model, frozen)
    if recipe.lora:
        _add_lora(model, recipe.lora)
    return model


def check_tuning(model: FourM, recipe: TrainRecipe) -> set[str]:
    """Published tensors that the recipe's patterns freeze; `model` may be on the meta device.

    Raises:
        ValueError: a pattern names no tensor, nothing is left to train, or low-rank updates are
            asked for without the package peft.
    """
    frozen = _matching(model, recipe.freeze)
    if recipe.lora:
        require_peft()
    elif frozen == _tensors(model).keys():
        raise ValueError(f"freeze={list(recipe.freeze)} leaves nothing to train")
    return frozen


def _matching(model: FourM, patterns: Sequence[str]) -> set[str]:
    names, found = _tensors(model), set[str]()
    for pattern in patterns:
        chosen = {name for name in names if fnmatchcase(name, pattern)}
        if not chosen:
            heads = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"the pattern {pattern!r} names no tensor; names begin with "
                             f"{', '.join(heads)}")
        found |= chosen
    return found


def _freeze(model: FourM, names: set[str]) -> None:
    """Keeps the published tensors `names` as they are. Modalities share tables: where only some
    rows of one stay, these are held (see `tasks.frozen`)."""
    import torch

    views = _tensors(model)
    for name, parameter in model.named_parameters():
        inside = {published for published, view in views.items() if _within(view, parameter)}
        if inside and inside <= names:
            parameter.requires_grad_(False)
        elif inside & names:
            rows = [_rows(views[published], parameter) for published in sorted(inside & names)]
            hold_rows(model, name, torch.cat(rows))


def _within(view: torch.Tensor, parameter: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def _rows(view: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows of a table that a view of it covers."""
    import torch

    width = parameter.shape[-1]
    first = (view.storage_offset() - parameter.storage_offset()) // width
    return torch.arange(first, first + view.numel() // width)


def require_peft() -> None:
    """Raises ValueError where the package for low-rank updates is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "low-rank updates need the package peft: pip install 'fourm[lora]'"
        ) from error


def _add_lora(model: FourM, lora: Lora) -> None:
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    alpha: Any = lora.alpha  # declared int by peft, which only divides it by the rank
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout,
                          target_modules=lora.modules)
    inject_adapter_in_model(settings, model)
    # peft leaves nothing but its own matrices to train; embeddings of new modalities are too.
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def finished(model: FourM) -> FourM:
    """The model as it is stored: low-rank updates merged."""
    updated: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    for name, layer in updated:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    return model
