"""Networks: one training step of 4M, and its encoder as a backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models import fourm
from models.fourm.attention import PADDING, target_mask
from models.fourm.backbone import Backbone, embed
from models.fourm.batch import Batch, from_released
from models.fourm.checkpoint import to_released
from models.fourm.model import FourM
from tests.golden.registry import Case, Check, close, exact, family, relative

HIDDEN, LOGITS, LOSS, GRADIENT = 2e-5, 1e-4, 1e-5, 1e-4


def load(case: Case) -> FourM:
    """The model of a case, with the lengths its description lists."""
    lengths = {name: (info["max_tokens"], info["max_length"])
               for name, info in case.info["modalities"].items() if "max_length" in info}
    return fourm.load(case.checkpoint, lengths=lengths)


@family("fm_*")
def network(case: Case) -> list[Check]:
    """Embeddings, encoder, decoder, logits, losses and gradients of one batch."""
    model = load(case)
    inputs: dict[str, dict[str, Any]] = {}
    for name, value in case.tensors.items():
        if name.startswith("in."):
            modality, key = name.removeprefix("in.").rsplit(".", 1)
            inputs.setdefault(modality, {})[key] = value
    batch = _batch(case, model, inputs, case.info)
    checks = _hidden(case, model, batch, "")
    checks += _logits(case, model, batch)
    checks += _losses(case, model, batch, "")
    checks += _gradients(case, model, batch)
    if "truncated_forward" in case.info:
        short = _batch(case, model, inputs, case.info["truncated_forward"])
        checks += _hidden(case, model, short, "trunc.") + _losses(case, model, short, "trunc.")
    return checks


def _batch(case: Case, model: FourM, inputs: dict, sizes: dict[str, Any]) -> Batch:
    return from_released(inputs, model.config, sizes["num_encoder_tokens"],
                         sizes["num_decoder_tokens"])


def _ids(case: Case, model: FourM, modality: Tensor) -> Tensor:
    """The case's modality ids of our own."""
    known = case.info["modalities"]
    table = torch.tensor([known[spec.name]["id"] for spec in model.config.modalities])
    return torch.where(modality == PADDING, PADDING, table[modality.clamp(min=0)])


@torch.no_grad()
def _hidden(case: Case, model: FourM, batch: Batch, part: str) -> list[Check]:
    want = {name.removeprefix(part): value for name, value in case.tensors.items()
            if name.startswith(part)}
    registers = model.config.num_register_tokens
    seen = torch.nn.functional.pad(batch.enc_mod != PADDING, (registers, 0), value=True)
    enc_mod = torch.nn.functional.pad(_ids(case, model, batch.enc_mod), (registers, 0), value=-1)
    used = batch.dec_mod != PADDING
    encoded = model.encode(batch)
    out = model.decode(encoded, batch.dec_ids, batch.dec_mod, batch.dec_pos, batch.dec_until)
    checks = [
        exact(f"{part}enc.blocked", ~seen, want["enc.blocked"]),
        exact(f"{part}enc.mod_id", enc_mod, want["enc.mod_id"]),
        close(f"{part}enc.out", model.features(batch)[seen], want["enc.out"][seen], HIDDEN),
        exact(f"{part}dec.mod_id", _ids(case, model, batch.dec_mod), want["dec.mod_id"]),
        close(f"{part}dec.out", out[used], want["dec.out"][used], HIDDEN),
    ]
    targets = torch.zeros_like(batch.dec_mod).view(-1).index_copy(0, batch.rows, batch.targets)
    targets = targets.view(used.shape)
    checks.append(exact(f"{part}dec.target_ids", targets[used], want["dec.target_ids"][used]))
    if "dec.context" in want:
        checks.append(close("dec.context", encoded.context[seen], want["dec.context"][seen],
                            HIDDEN))
        checks.append(exact("dec.blocked", ~used, want["dec.blocked"]))
        pairs = used.unsqueeze(1) & used.unsqueeze(2)
        blocked = ~target_mask(batch.dec_mod, batch.dec_until)
        checks.append(exact("dec.attn_blocked", blocked[pairs], want["dec.attn_blocked"][pairs]))
    if "enc.emb" in want:
        tokens, emb = model.embed_inputs(batch)
        checks += [close("enc.emb", emb[seen], want["enc.emb"][seen], HIDDEN),
                   close("enc.tokens", tokens[seen], want["enc.tokens"][seen], HIDDEN)]
        both = model.embed_targets(batch.dec_ids, batch.dec_mod, batch.dec_pos)
        checks.append(close("dec.tokens + dec.emb", both[used],
                            (want["dec.tokens"] + want["dec.emb"])[used], HIDDEN))
    return checks


@torch.no_grad()
def _logits(case: Case, model: FourM, batch: Batch) -> list[Check]:
    out = model.decode(model.encode(batch), batch.dec_ids, batch.dec_mod, batch.dec_pos,
                       batch.dec_until)
    hidden = out.reshape(-1, out.shape[-1])[batch.rows].split(batch.counts)
    targets = batch.targets.split(batch.counts)
    checks = []
    for spec, rows, ids in zip(model.config.modalities, hidden, targets, strict=True):
        if f"logits.{spec.name}" in case.tensors:
            checks.append(close(f"logits.{spec.name}", model.logits(rows, spec),
                                case.tensors[f"logits.{spec.name}"], LOGITS))
            checks.append(exact(f"logits_targets.{spec.name}", ids,
                                case.tensors[f"logits_targets.{spec.name}"]))
        elif len(ids):
            checks.append(Check(f"logits.{spec.name} is not among the vectors", float("inf"), 0))
    return checks


def _losses(case: Case, model: FourM, batch: Batch, part: str) -> list[Check]:
    config, checks = model.config, []
    counts = {spec.name: n for spec, n in zip(config.modalities, batch.counts, strict=True)
              if spec.is_target}
    stated = case.info["truncated_forward" if part else "losses"]
    stated = stated["losses"] if part else stated
    checks.append(exact(f"{part}target counts", list(counts.values()),
                        [stated["target_counts"][name] for name in counts]))
    for kind in ("mod", "token"):
        model.config = replace(config, loss=kind)
        with torch.no_grad():
            losses = model(batch)
        model.config = config
        checks.append(close(f"{part}loss.{kind}", losses.total,
                            case.tensors[f"{part}loss.{kind}"], LOSS))
    for name, value in losses.per_modality.items():
        if not part:
            checks.append(close(f"loss.{name}", value,
                                case.tensors[f"loss.per_modality.{name}"], LOSS))
    return checks


def _gradients(case: Case, model: FourM, batch: Batch) -> list[Check]:
    model.zero_grad()
    model(batch).total.backward()
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad
           for name, p in model.named_parameters()}
    found = to_released(model, own)
    checks = [relative(name, found[name.removeprefix("grad.")], want, GRADIENT)
              for name, want in case.tensors.items() if name.startswith("grad.")]
    for name, norm in case.info["grad_norms_of_loss_mod"].items():
        checks.append(relative(f"norm of grad.{name}", found[name].norm(), norm, GRADIENT))
    return checks


@family("fmvit")
@torch.no_grad()
def backbone(case: Case) -> list[Check]:
    """The encoder over pictures of the model's own size and of twice that size."""
    model = fourm.load(case.checkpoint)
    net, tensors, checks = Backbone.of(model), case.tensors, []
    for size in ("base", "larger"):
        picture, want = tensors[f"{size}.image_uint8"], tensors[f"{size}.features"]
        checks.append(close(f"{size}, uint8", net.forward_features(picture), want, HIDDEN))
        checks.append(exact(f"{size}, side", picture.shape[-1], case.info["image_sizes"][size]))
    checks.append(close("base, float", net.forward_features(tensors["base.input"]),
                        tensors["base.features"], HIDDEN))
    name = next(spec.name for spec in model.config.inputs if spec.kind == "pixels")
    found = embed(model, {name: tensors["base.image_uint8"]})
    checks.append(close("base, as one of many modalities", found[name].tokens,
                        tensors["base.features"], HIDDEN))
    return checks
