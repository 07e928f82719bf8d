"""How fast 4M-7 with random weights generates from pixels, and what its encoder alone costs."""

from __future__ import annotations

import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infra.machine import peak_rss
from models.fourm.backbone import Backbone, embed
from models.fourm.catalogue import SIZE
from models.fourm.conditions import Shown
from models.fourm.decoding import Decoding, as_condition, draw
from models.fourm.model import FourM
from models.fourm.presets import TARGET_ORDER, base_name, default_decoding
from tests.benchmarks.data import FIRST_WORD
from tests.benchmarks.measure import Call, Options, Record, rounds, under_way
from tests.benchmarks.peer import Peer
from tests.benchmarks.seven import save_model

ROWS, PICTURES, TOP_P = 1, 16, 0.8
PIXELS, DEPTH = f"rgb@{SIZE}", f"tok_depth@{SIZE}"
_MASKGIT = Decoding(order="maskgit", steps=8, top_p=TOP_P)
Plan = dict[str, Decoding]


def plans(model: FourM) -> dict[str, Plan]:
    """What is generated from pixels: targets in their order, and how each is decoded."""
    by_base = {base_name(spec.name): spec for spec in model.config.targets}
    every, given = dict[str, Decoding](), [PIXELS]
    for name in TARGET_ORDER:
        if name in by_base and name != "rgb":
            spec = by_base[name]
            every[spec.name] = default_decoding(spec, given)
            given.append(spec.name)
    return {
        "depth": {DEPTH: _MASKGIT},
        "depth_guided": {DEPTH: replace(_MASKGIT, guidance=2.0)},
        "caption": {"caption": every["caption"]},
        "all": every,
    }


def generate(options: Options) -> list[Record]:
    """Samples/s from pixels: depth by MaskGIT without and with guidance, a caption word by word,
    and all modalities one after the other as the released sampler does by default."""
    return [record for size in options.sizes for record in _generate(options, size)]


def _generate(options: Options, size: str) -> list[Record]:
    records = []
    with tempfile.TemporaryDirectory(prefix="fourm-bench-") as folder, ExitStack() as stack:
        model = save_model(Path(folder), size)
        peer = stack.enter_context(Peer(options.peer, options.threads)) if options.peer else None
        for name, plan in plans(model).items():
            title = f"generate.{size}.{name}"
            if options.only not in title:
                continue
            tokens: list[int] = []
            calls: list[Call] = [lambda plan=plan, tokens=tokens: tokens.append(  # type: ignore[misc]
                _chain(model, plan, options.dtype == "bf16"))]
            if peer:
                calls.append(peer.prepare("generate", at=folder, given=[PIXELS], top_p=TOP_P,
                                          rows=ROWS, plan=_peer_plan(model, plan)))
            with under_way(title):
                taken = rounds(calls, options.seconds)
            records.append(_record(title, options, taken, peer, ROWS, tokens[-1],
                                   {"rows": ROWS, "targets": list(plan)}))
    return records


def _record(
    title: str, options: Options, taken: list[list[float]], peer: Peer | None, rows: int,
    tokens: float, shape: dict[str, Any],
) -> Record:  # fmt: skip
    """`tokens` are those of a sample."""
    speeds = [rows / statistics.median(side) for side in taken]
    also = {"tokens_per_second": round(speeds[0] * tokens, 1),
            "tokens_per_sample": round(tokens, 1), "peak_mb": round(peak_rss() / 1e6)}
    if peer:
        also["peer_peak_mb"] = round(peer.peak / 1e6)
        if "tokens" in peer.found:
            also["peer_tokens_per_sample"] = round(peer.found["tokens"], 1)
    return Record(name=title, unit="samples/s", ours=round(speeds[0], 3),
                  peer=round(speeds[1], 3) if peer else None, shape=shape, dtype=options.dtype,
                  threads=options.threads, also=also)


def _autocast(bf16: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def _chain(model: FourM, plan: Plan, bf16: bool) -> int:
    """Generates all targets of a plan; returns the tokens of a sample."""
    spec = model.config.by_name[PIXELS]
    shape = ROWS, spec.max_tokens, spec.dense_width
    visible = torch.ones(shape[:2], dtype=torch.bool)
    shown = {PIXELS: Shown(torch.randint(0, 256, shape, dtype=torch.uint8), visible)}
    count = 0
    for name, decoding in plan.items():
        with _autocast(bf16):
            drawn = draw(model, shown, name, decoding, range(ROWS))
        shown[name] = as_condition(model.config, name, drawn)
        count += int(drawn.lengths.sum()) // ROWS
    return count


def _peer_plan(model: FourM, plan: Plan) -> dict[str, Any]:
    """The same as arguments of the released schedule."""
    ways = plan.values()
    return {
        "target_domains": list(plan),
        "tokens_per_target": [model.config.by_name[name].max_tokens for name in plan],
        "autoregression_schemes": [way.order for way in ways],
        "decoding_steps": [way.steps for way in ways],
        "token_decoding_schedules": [way.schedule for way in ways],
        "temps": [way.temperature for way in ways],
        "temp_schedules": [way.temperature_schedule for way in ways],
        "cfg_scales": [way.guidance for way in ways],
        "cfg_schedules": ["constant" for _ in ways],
    }


def encode(options: Options) -> list[Record]:
    """Pictures/s of the encoder as a ViT, and samples/s of embeddings of three modalities."""
    return [record for size in options.sizes for record in _encode(options, size)]


def _encode(options: Options, size: str) -> list[Record]:
    bf16 = options.dtype == "bf16"
    with tempfile.TemporaryDirectory(prefix="fourm-bench-") as folder, ExitStack() as stack:
        model = save_model(Path(folder), size)
        vit, pictures = Backbone.of(model), torch.randn(PICTURES, 3, SIZE, SIZE)
        specs = model.config.by_name
        ids = torch.randint(0, specs[DEPTH].vocab_size, (PICTURES, specs[DEPTH].max_tokens))
        words = torch.randint(FIRST_WORD, specs["caption"].vocab_size, (PICTURES, 40))

        @torch.inference_mode()
        def view() -> None:
            with _autocast(bf16):
                vit.forward_features(pictures)

        @torch.inference_mode()
        def several() -> None:
            with _autocast(bf16):
                embed(model, {PIXELS: pictures, DEPTH: ids, "caption": words})

        peer = stack.enter_context(Peer(options.peer, options.threads)) if options.peer else None
        calls: list[Call] = [view]
        if peer:
            config = json.loads((Path(folder) / "config.json").read_text())
            calls.append(peer.prepare("encode", at=folder, rows=PICTURES, config=config))
        taken = rounds(calls, options.seconds)
        slots = specs[PIXELS].max_tokens
        records = [_record(f"encode.{size}.rgb", options, taken, peer, PICTURES, slots,
                           {"rows": PICTURES, "inputs": [PIXELS]})]
        more = slots + ids.shape[1] + words.shape[1]
        records.append(_record(f"encode.{size}.several", options,
                               rounds([several], options.seconds), None, PICTURES, more,
                               {"rows": PICTURES, "inputs": [PIXELS, DEPTH, "caption"]}))
    return [record for record in records if options.only in record.name]
