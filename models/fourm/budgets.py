"""How many tokens each modality of a sample shows and predicts. B samples, m modalities."""

from __future__ import annotations

import numpy as np

from models.fourm.draws import Draws

RETRIES = 100


def draw_budgets(
    draws: Draws, tag: str, alpha: np.ndarray, total: np.ndarray, limit: np.ndarray,
    least: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws budgets [B,m], not yet clamped, and the shares [B,m] they are floors of.

    Args:
        draws: Random numbers; `tag` tells input from target budgets.
        tag: "input" or "target".
        alpha: Dirichlet concentrations [whole batch, m]; 0 gives nothing.
        total: Tokens [B].
        limit: What modalities can take [B,m].
        least: What they must get [B,m] once clamped; where a draw gives less, the sample draws
            again, up to `RETRIES` times.
    """
    def draw(part: str) -> tuple[np.ndarray, np.ndarray]:
        drawn = draws.dirichlet(f"{tag}s{part}", alpha)
        return split_budget(drawn, total, draws.picks(f"{tag} rest{part}", alpha)), drawn

    budget, share = draw("")
    for attempt in range(1, RETRIES):
        short = (np.minimum(budget, limit) < least).any(1)
        if not short.any():
            break
        again, drawn = draw(f" {attempt}")
        budget[short], share[short] = again[short], drawn[short]
    return budget, share


def split_budget(share: np.ndarray, total: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Budgets [B,m] that sum to `total` [B]: floors of share [B,m] * total, what is left over goes
    one by one to the modalities in picks [B, >= m]."""
    budget = np.floor(share.astype(np.float32) * total[:, None].astype(np.float32)).astype(int)
    left = total - budget.sum(1)
    given = np.arange(picks.shape[1]) < left[:, None]
    row, col = np.nonzero(given)
    np.add.at(budget, (row, picks[row, col]), 1)
    return budget


def redistribute(budget: np.ndarray, limit: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Clamps budget [B,m] to limit [B,m] and gives the excess to modalities that have room and a
    share, in proportion to it; what fits nowhere is lost."""
    total = budget.sum(1)
    budget = np.minimum(budget, limit)
    rows = np.flatnonzero(total > budget.sum(1))
    for _ in range(2 * budget.shape[1]):
        # Only rows that have something left and room for it are looked at again.
        left = total[rows] - budget[rows].sum(1)
        room = np.where(share[rows] > 0, limit[rows] - budget[rows], 0)
        pending = (left > 0) & (room.sum(1) > 0)
        rows, left, room = rows[pending], left[pending], room[pending]
        if not len(rows):
            break
        weight = np.where(room > 0, np.maximum(share[rows], 1e-9), 0.0)
        weight /= weight.sum(1, keepdims=True)
        extra = np.floor(weight * left[:, None]).astype(int)
        # The rest of the floors goes to the largest weight, so that every round makes progress.
        extra[np.arange(len(extra)), weight.argmax(1)] += left - extra.sum(1)
        budget[rows] += np.minimum(np.maximum(extra, 0), room)
    return budget
