"""How well each modality predicts each other: mean loss per token, in nats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.fourm.conditions import FIRST, LAST, Context, Shown
from models.fourm.generate import Generator, base_name
from models.fourm.spec import EOS_ID

if TYPE_CHECKING:
    from models.fourm.spec import ModalitySpec

NOTHING = "nothing"


def loss_matrix(
    generator: Generator, values: Mapping[str, Sequence[Any]], batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """Mean loss of every target given one modality whole, and given nothing.

    Args:
        generator: The model.
        values: Modality to one value a sample, of all modalities that take part.
        batch_size: Samples run together.

    Returns:
        {input: {target: loss}}; an input does not predict itself.
    """
    targets = [s for s in generator.model.config.targets if base_name(s.name) in values]
    inputs = [NOTHING, *(name for name in generator.inputs if name in values)]
    count = len(next(iter(values.values())))
    sums = {name: {base_name(t.name): np.zeros(2) for t in targets} for name in inputs}
    for start in range(0, count, batch_size):
        part = {name: value[start : start + batch_size] for name, value in values.items()}
        facts = {t.name: _target(generator, t, part[base_name(t.name)]) for t in targets}
        for name in inputs:
            shown = {} if name == NOTHING else generator.show({name: part[name]})
            for spec in targets:
                if base_name(spec.name) != name:
                    sums[name][base_name(spec.name)] += _loss(generator, shown, spec,
                                                              facts[spec.name])  # fmt: skip
    return {
        name: {target: round(float(total / n), 4) for target, (total, n) in row.items() if n}
        for name, row in sums.items()
    }


def _target(generator: Generator, spec: ModalitySpec, values: Sequence[Any]) -> Shown:
    """Tokens of a target; sequences as [S_1] ids [EOS] [S_2]."""
    import torch

    shown = generator.shown_as(spec, values)
    if spec.kind != "seq":
        return shown
    rows, lengths = shown.values, shown.visible.sum(1)
    full = torch.zeros(len(rows), rows.shape[1] + 2, dtype=torch.long)
    used = torch.zeros(full.shape, dtype=torch.bool)
    full[:, 0], used[:, 0] = FIRST, True
    for row, length in enumerate(lengths.tolist()):
        full[row, 1 : length + 1] = rows[row, :length]
        closed = length + 2 if full[row, length] == EOS_ID else length + 1
        full[row, length + 1] = LAST
        used[row, :closed] = True
    return Shown(full, used)


def _loss(
    generator: Generator, shown: Mapping[str, Shown], spec: ModalitySpec, fact: Shown
) -> np.ndarray:
    """Summed loss and number of tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    model = generator.model
    device = model.mask_token.device
    ids, used = fact.values.to(device), fact.visible.to(device)
    if spec.kind == "seq":
        fed, goal, used = ids[:, :-1], ids[:, 1:], used[:, 1:]
    else:
        fed, goal = torch.zeros_like(ids), ids
    # Without any condition the encoder still needs a slot to read, of which nothing is visible.
    own = {} if shown else {spec.name: Shown(fed, torch.zeros_like(fed, dtype=torch.bool))}
    place = torch.arange(fed.shape[1], device=device).expand_as(fed)
    wrapped = torch.where(place < spec.position_limit, place, 0) if spec.kind == "seq" else place
    until = place + 1 if spec.kind == "seq" else torch.full_like(place, fed.shape[1])
    modality = torch.full_like(fed, model.config.index(spec.name))
    with torch.inference_mode(), generator.precision():
        context = Context.read(model, {**shown, **own})
        y = model.decode(context.encoded, fed, modality, wrapped, until, context.caches)
        losses = cross_entropy(model.logits(y[used], spec).float(), goal[used], reduction="sum")
    return np.array([float(losses), int(used.sum())])
