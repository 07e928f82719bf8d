"""Masking with given draws, and decoding schedules."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.fourm.budgets import draw_budgets, redistribute
from models.fourm.draws import Draws
from models.fourm.masking import Component, Mixture, Samples, mask_batch
from models.fourm.schedules import temperature_schedule, token_schedule
from models.fourm.spans import (
    cut_chunks,
    cut_targets,
    fit_inputs,
    fit_vectors,
    merge_spans,
    span_mask,
)
from models.fourm.spec import FourMConfig, ModalitySpec
from tests.golden.registry import Case, Check, close, exact, family

SCHEDULE = 1e-6


@family("schedules")
def schedules(case: Case) -> list[Check]:
    """Tokens and temperature of each step."""
    checks = []
    for kind in ("cosine", "linear"):
        for entry in case.info[kind]:
            found = token_schedule(kind, entry["steps"], entry["tokens"])
            checks.append(exact(f"{kind} {entry['steps']} of {entry['tokens']}", found,
                                entry["schedule"]))
    for entry in case.info["temperature"]:
        counts = token_schedule(entry["token_schedule"], entry["steps"], entry["tokens"])
        onex = f"onex:{entry['min_t']}:{entry['power']}"
        for kind, name in ((onex, "onex"), ("linear", "linear")):
            checks.append(close(f"{kind} {entry['steps']} of {entry['tokens']}",
                                temperature_schedule(kind, entry["max_t"], counts), entry[name],
                                SCHEDULE))
    return checks


@family("masking")
def masking(case: Case) -> list[Check]:
    """Spans, chunks, merging, sequences under a budget, grids, vectors and budgets."""
    parts = {
        "span_masking": _span, "chunk_span_masking": _chunks, "merge_spans": _merged,
        "sequence_mask": _sequence, "image_mask": _image, "embedding_mask": _vectors,
        "budgets": _budgets,
    }
    unknown = sorted(key for key, value in case.info.items()
                     if isinstance(value, list) and key not in parts)
    if unknown:
        raise ValueError(f"unknown parts: {', '.join(unknown)}")
    return [exact(f"{name} {i}: {what}", got, want)
            for name, part in parts.items() for i, entry in enumerate(case.info[name])
            for what, got, want in part(entry)]


Pairs = list[tuple[str, Any, Any]]


def _row(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([ids], np.int64), np.array([len(ids)])


def _list(ragged: tuple[np.ndarray, np.ndarray]) -> list[int]:
    return ragged[0][0, : ragged[1][0]].tolist()


def _flat(chunks: list[list[int]]) -> tuple[list[int], np.ndarray]:
    """Tokens of chunks, and the number of the chunk of each [1,L]."""
    numbers = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
    return [token for chunk in chunks for token in chunk], numbers[None]


def _span(entry: dict[str, Any]) -> Pairs:
    inputs, targets = span_mask(*_row(entry["ids"]), np.array([entry["keep"]], bool))
    return [("inputs", _list(inputs), entry["input_ids"]),
            ("targets", _list(targets), entry["target_ids"])]


def _chunks(entry: dict[str, Any]) -> Pairs:
    ids, numbers = _flat(entry["chunks"])
    return _span({**entry, "ids": ids, "keep": np.array(entry["keep"])[numbers[0]]})


def _merged(entry: dict[str, Any]) -> Pairs:
    return [("ids", merge_spans(entry["input_ids"], entry["target_ids"]), entry["merged_ids"])]


def _sequence(entry: dict[str, Any]) -> Pairs:
    """A sequence under budgets, laid out as released code does: inputs, then targets."""
    longest, room = entry["max_tokens"], entry["input_budget"]
    chunked = isinstance(entry["ids"][0], list)
    ids, numbers = _flat(entry["ids"] if chunked else [[token] for token in entry["ids"]])
    keeps = [np.array([keep])[:, numbers[0]] for keep in entry["keep_masks"]]
    tried: list[int] = []

    def draw(attempts: np.ndarray, _: np.ndarray) -> np.ndarray:
        tried.extend(attempts.tolist())
        return np.where(keeps[tried[-1]], 0.0, 1.0)

    table, length = _row(ids)
    pairs = [("whole chunks", cut_chunks(length, numbers, longest), length)]
    inputs, targets = fit_inputs(table, length, np.ones(1), np.array([room]), draw,
                                 chunked=chunked)
    cut = cut_targets(targets, np.array([entry["target_budget"]]),
                      np.array([entry["chosen_sentinel_index"]]))
    tensor = np.zeros(2 * (longest + 1), np.int64)
    shown, aims = _list(inputs), _list(cut)
    tensor[: len(shown)] = shown
    tensor[room : room + len(aims)] = aims
    attend = {str(room + i): 1 for i in range(len(aims))}
    return [*pairs, ("attempts", len(tried), entry["attempts_used"]),
            ("tensor", tensor, entry["tensor"]),
            ("visible", list(range(len(shown))), entry["visible_positions"]),
            ("targets", [room + i for i in range(len(aims))], entry["target_positions"]),
            ("attention", _pairs(attend), _pairs(entry["decoder_attention_mask_nonzero"]))]


def _pairs(table: dict[str, int]) -> list[list[int]]:
    return sorted([int(key), value] for key, value in table.items())


class _Given(Draws):
    """Draws for one sample that are stated and not random."""

    def __init__(self, shares: dict[str, list[list[float]]], picks: dict[str, list[list[int]]],
                 rank: list[int] | None = None) -> None:
        super().__init__(0, 0, 1)
        self._shares, self._picks, self._rank = shares, picks, rank or []

    def dirichlet(self, tag: str, alpha: np.ndarray, *extra: int) -> np.ndarray:
        kind, *attempt = tag.split()
        return np.array([self._shares[kind.removesuffix("s")][int(*attempt)]])

    def picks(self, tag: str, alpha: np.ndarray) -> np.ndarray:
        kind, _, *attempt = tag.split()
        return np.array([self._picks[kind][int(*attempt)][: alpha.shape[1]]])

    def words(
        self, tag: str, count: int, chosen: np.ndarray | None = None,
        part: np.ndarray | None = None,
    ) -> np.ndarray:
        if tag.startswith("grid"):
            return np.array([self._rank], np.uint32) << 16
        return super().words(tag, count, chosen, part)


def _image(entry: dict[str, Any]) -> Pairs:
    """Positions of a grid beside a second one, which gets one token of either kind: no batch is
    empty."""
    size, shown = entry["num_tokens"], entry["input_budget"]
    aims = size - shown if entry["target_budget"] is None else entry["target_budget"]
    specs = tuple(ModalitySpec(name=name, kind="img", max_tokens=size, vocab_size=size)
                  for name in ("grid", "other"))
    even = {"grid": 1.0, "other": 1.0}
    mixture = Mixture(components=(Component(
        inputs=even, targets=even, num_inputs=(shown + 1, shown + 1),
        num_targets=(aims + 1, aims + 1)),))
    shares = {kind: [[(part + 0.25) / (count + 1) for part in (count, 1)]]
              for kind, count in (("input", shown), ("target", aims))}
    none = [[0, 0]]
    given = _Given(shares, {"input": none, "target": none}, entry["rank"])
    grid = np.arange(size)[None]
    config = FourMConfig(modalities=specs, dim=4, num_heads=1)
    batch = mask_batch(config, Samples(grids={"grid": grid, "other": grid}), mixture, given)
    seen, aimed = (mod[0] == 0 for mod in (batch.enc_mod, batch.dec_mod))
    targets, attend = batch.dec_pos[0][aimed].tolist(), batch.dec_until[0][aimed].tolist()
    stated = _pairs(entry["decoder_attention_mask_nonzero"])
    return [("visible", batch.enc_pos[0][seen].tolist(), entry["visible_positions"]),
            ("targets", targets, entry["target_positions"]),
            ("target ids", batch.targets[: batch.counts[0]].tolist(), entry["target_positions"]),
            ("attention", attend, [count for _, count in stated for _ in range(count)]),
            ("first target", targets[:1], [place for place, _ in stated])]


def _vectors(entry: dict[str, Any]) -> Pairs:
    count, longest = entry["num_embeddings"], entry["max_tokens"]
    keep = np.where(np.array([entry["keep"]]), 0.0, 1.0)
    source, visible = fit_vectors(np.array([count]), count, np.ones(1),
                                  np.array([entry["input_budget"]]), lambda *_: keep)
    rows = np.zeros(longest, int)
    rows[: visible[0]] = source[0, : visible[0]] + 1
    return [("rows", rows, entry["output_rows"]),
            ("visible", list(range(visible[0])), entry["visible_positions"]),
            ("targets", [], entry["target_positions"])]


def _budgets(entry: dict[str, Any]) -> Pairs:
    image, longest = np.array(entry["modality_is_image"]), np.array([entry["max_tokens"]])
    least = np.array([entry["min_tokens"]])
    given = _Given({kind: entry[f"{kind}_draws"] for kind in ("input", "target")},
                   {kind: entry[f"{kind}_leftover_argmax"] for kind in ("input", "target")})
    limits = {"input": longest,
              "target": longest - np.where(image, np.array([entry["input_budget"]]), 0)}
    pairs: Pairs = []
    for kind, limit in limits.items():
        budget, share = draw_budgets(given, kind, np.ones(limit.shape),
                                     np.array([entry[f"num_{kind}_tokens"]]), limit,
                                     least if kind == "input" else 0 * least)
        # Without shares to go by, excess is lost, as released models were trained.
        pairs.append((kind, redistribute(budget, limit, 0 * share)[0], entry[f"{kind}_budget"]))
    return pairs
