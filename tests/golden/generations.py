"""Generation traces: whole decode loops whose choices are argmax, and whose orders are stated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from models.fourm import sampling
from models.fourm.backbone import patches
from models.fourm.conditions import FIRST, LAST, Shown
from models.fourm.decoding import Decoding, Drawn, Step, as_condition, draw
from models.fourm.model import FourM
from models.fourm.schedules import temperature_schedule, token_schedule
from models.fourm.spans import merge_spans
from tests.golden.networks import LOGITS, load
from tests.golden.registry import Case, Check, close, exact, family

GUIDED, CONFIDENCE = 2e-4, 1e-5


@family("generation")
def generation(case: Case) -> list[Check]:
    """Every trace: logits, positions and confidences of each step, and what comes out."""
    model = load(case)
    checks: list[Check] = []
    for name, info in case.info["traces"].items():
        trace = _Trace(case, model, name, info)
        if "weights" in info:
            checks += trace.weighted()
        elif "steps" in info:
            checks += trace.grids()
        else:
            checks += trace.sequence()
    return checks


def greedy(
    logits: Tensor, noise: Tensor, temperature: float, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """The most likely tokens, and their probability at `temperature`."""
    best = logits.argmax(-1, keepdim=True)
    heat = temperature or 1.0
    return best.squeeze(-1), (logits / heat).softmax(-1).gather(-1, best).squeeze(-1)


@contextmanager
def argmax() -> Iterator[None]:
    """Lets the decode loop take the most likely tokens at any temperature."""
    old = sampling.sample
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("models.") and getattr(module, "sample", None) is old:
                stack.enter_context(patch.object(module, "sample", greedy))
        yield


@dataclass
class _Trace:
    case: Case
    model: FourM
    name: str
    info: dict[str, Any]
    seen: list[Step] = field(default_factory=list)

    def tensor(self, key: str) -> Tensor:
        return self.case.tensors[f"{self.name}.{key}"]

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.case.tensors

    def start(self, prefix: str = "start.") -> dict[str, Shown]:
        """Conditions of the trace: modalities with a visible token, the [S_1] of a sequence that
        is written later among them."""
        found = {}
        for spec in self.model.config.modalities:
            if not self.has(f"{prefix}{spec.name}.tensor"):
                continue
            values = self.tensor(f"{prefix}{spec.name}.tensor")
            if spec.kind == "pixels":
                values = patches(values, spec.patch_size)
            visible = ~self.tensor(f"{prefix}{spec.name}.input_mask")
            if visible.any():
                found[spec.name] = Shown(values.long() if spec.discrete else values, visible)
        return found

    def draw(self, shown: dict[str, Shown], target: str, decoding: Decoding,
             order: Sequence[int] = ()) -> Drawn:
        self.seen = []
        rows = len(next(iter(shown.values())).visible)
        ranks = torch.argsort(torch.tensor(order)) / len(order) if len(order) else None
        with argmax():
            return draw(self.model, shown, target, decoding, [0] * rows,
                        ranks=None if ranks is None else ranks.expand(rows, -1),
                        observe=self.seen.append)

    def grids(self) -> list[Check]:
        """Chains of grids, a sequence at the end where there is one; steps are numbered through."""
        shown, checks, first = self.start(), [], 0
        for target, group in groupby(self.info["steps"], key=lambda step: step["target"]):
            steps = list(group)
            if steps[0]["scheme"] == "autoregressive":
                drawn = self.draw(shown, target, _greedy_text())
                checks += self.merged(drawn, f"step{first}.tensor_after")
            else:
                order = [p for i, step in enumerate(steps) if step["scheme"] == "roar"
                         for p in self.tensor(f"step{first + i}.positions")[0].tolist()]
                drawn = self.draw(shown, target, _decoding(steps), order)
                checks += [check for i, step in enumerate(steps)
                           for check in self.step(first + i, self.seen[i], step)]
                checks.append(exact(f"{self.name}: {target}", drawn.ids,
                                    self.tensor(f"end.{target}.tensor")))
            shown[target] = as_condition(self.model.config, target, drawn)
            first += len(steps)
        return checks

    def step(self, number: int, found: Step, step: dict[str, Any]) -> list[Check]:
        """One step of a grid: the loop decodes positions in ascending order."""
        name, key = f"{self.name} step {number}", f"step{number}."
        places, order = self.tensor(f"{key}positions").sort(1)

        def want(what: str) -> Tensor:
            return self.tensor(f"{key}{what}").gather(
                1, order.unsqueeze(2).expand(-1, -1, found.logits.shape[2]))

        checks = [exact(f"{name}: positions", found.positions, places)]
        if self.has(f"{key}logits_guided"):
            hidden, open_ = found.branches
            checks += [close(f"{name}: guided", found.logits, want("logits_guided"), GUIDED),
                       close(f"{name}: unconditional", hidden, want("logits_uncond"), LOGITS),
                       close(f"{name}: conditional", open_, want("logits"), LOGITS)]
        else:
            checks.append(close(f"{name}: logits", found.logits, want("logits"), LOGITS))
        if self.has(f"{key}confidence"):
            _, sure = greedy(found.logits, found.logits, step["temperature"])
            checks.append(close(f"{name}: confidence", sure,
                                self.tensor(f"{key}confidence").gather(1, order), CONFIDENCE))
        return checks

    def weighted(self) -> list[Check]:
        """Several weighted conditions. Counts follow no schedule of ours: each step is drawn from
        the state before it, and the most confident tokens are written here."""
        target, weights = self.info["target"], self.info["weights"]
        parts = [self.start(f"start.cond{i}.") for i in range(len(weights))]
        shown = {name: part for each in parts for name, part in each.items()}
        scales = {next(iter(part)): weight for part, weight in zip(parts, weights, strict=True)}
        decoding = Decoding(order="maskgit", steps=1, temperature=0.0, guidance=scales)
        state, checks = self.tensor(f"start.uncond.{target}.tensor").long(), []
        visible = ~self.tensor(f"start.uncond.{target}.input_mask")
        for number, step in enumerate(self.info["steps"]):
            name, key = f"{self.name} step {number}", f"step{number}."
            self.draw({**shown, target: Shown(state, visible)}, target, decoding)
            found = self.seen[0]
            checks += [exact(f"{name}: positions", found.positions, self.tensor(f"{key}positions")),
                       close(f"{name}: combined", found.logits,
                             self.tensor(f"{key}logits_combined"), GUIDED)]
            for branch, what in zip(found.branches, ("uncond", "cond0", "cond1"), strict=True):
                checks.append(close(f"{name}: {what}", branch,
                                    self.tensor(f"{key}logits_{what}"), LOGITS))
            ids, sure = greedy(found.logits, found.logits, step["temperature"])
            best = sure.topk(step["num_tokens"], 1).indices
            places = found.positions.gather(1, best)
            state = state.scatter(1, places, ids.gather(1, best))
            visible = visible.scatter(1, places, True)
            checks += [exact(f"{name}: tokens", state, self.tensor(f"{key}tensor_after")),
                       exact(f"{name}: visible", ~visible, self.tensor(f"{key}input_mask_after"))]
        return checks

    def sequence(self) -> list[Check]:
        """A sequence from left to right. Finished rows leave our batch, not the released one's."""
        drawn = self.draw(self.start(), "caption", _greedy_text(
            self.info["guidance_scale"], self.info["guided_conditions"]))
        ids, checks = self.tensor("generated_ids"), []
        for row, wanted in enumerate(ids.tolist()):
            wanted = wanted[1 : wanted.index(LAST)]
            checks.append(exact(f"{self.name} row {row}", drawn.ids[row, : drawn.lengths[row]],
                                wanted))
        for number, found in enumerate(self.seen):
            active = torch.tensor([LAST not in row[: number + 1] for row in ids.tolist()])
            name, guided = f"{self.name} step {number}", self.has("step_logits_cond")
            pairs = [("step_logits", found.logits, GUIDED if guided else LOGITS)]
            if guided:
                pairs += [("step_logits_uncond", found.branches[0], LOGITS),
                          ("step_logits_cond", found.branches[1], LOGITS)]
            checks += [close(f"{name}: {what}", logits[:, 0], self.tensor(what)[active, number],
                             tolerance) for what, logits, tolerance in pairs]
        steps = self.tensor("step_logits").shape[1]
        checks.append(exact(f"{self.name}: steps", len(self.seen), steps))
        return checks + self.merged(drawn, "end.caption.tensor")

    def merged(self, drawn: Drawn, key: str) -> list[Check]:
        """Sequences with their spans put back: a sentinel inside the text ends it."""
        texts = [merge_spans([FIRST], [FIRST, *ids[:length], LAST])
                 for ids, length in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)]
        return [exact(f"{self.name}: {key}", texts, self.tensor(key))]


def _greedy_text(scale: float | None = None, guided: Sequence[str] = ()) -> Decoding:
    return Decoding(order="autoregressive", temperature=0.0, show_opening=True,
                    guidance=1.0 if scale is None else scale, guided=frozenset(guided) or None)


def _decoding(steps: Sequence[dict[str, Any]]) -> Decoding:
    """Settings of our own whose schedules are the stated ones."""
    counts, heats = ([step[key] for step in steps] for key in ("num_tokens", "temperature"))
    schedule = next(kind for kind in ("cosine", "linear")
                    if token_schedule(kind, len(counts), sum(counts)) == counts)
    heat = next(kind for kind in ("constant", "linear")
                if temperature_schedule(kind, heats[0], counts) == heats or not heats[0])
    return Decoding(
        order=steps[0]["scheme"], steps=len(steps), schedule=schedule, temperature=heats[0],
        temperature_schedule=heat, guidance=steps[0]["cfg_scale"],
        guided=frozenset(steps[0]["cfg_cond_domains"]),
    )
