"""How many tokens each decoding step accepts, and at which temperature it samples.

Pure functions of plain numbers, as the released models are decoded.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

TokenSchedule = Literal["cosine", "linear"]

_TABLE_END = 100.0
"""The 1/x temperature table runs over x in 1..100."""
_FLOOR = 1e-9


def token_schedule(
    kind: TokenSchedule, steps: int, tokens: int, *, fewer: bool = False
) -> list[int]:
    """Tokens accepted at each step; they sum to `tokens`.

    Args:
        kind: "cosine" accepts few tokens at first and last and many between; "linear" equally
            many at every step.
        steps: Steps wanted; a linear schedule never has more steps than tokens.
        tokens: Tokens to generate.
        fewer: Whether to take fewer steps where so many do not exist.

    Raises:
        ValueError: unknown kind, no steps or tokens, or so many cosine steps that rounding makes
            the last one negative.
    """
    if steps < 1 or tokens < 1:
        raise ValueError(f"a schedule needs steps and tokens, not {steps} steps for {tokens}")
    if kind == "linear":
        edges = [tokens * i // steps for i in range(steps + 1)]
        counts = sorted((b - a for a, b in pairwise(edges)), reverse=True)
        return [count for count in counts if count]
    if kind != "cosine":
        raise ValueError(f"unknown token schedule {kind!r}; choose from cosine, linear")
    share = [0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    counts = [round(tokens * (a - b)) for a, b in pairwise(share)]
    counts.append(tokens - sum(counts))
    if counts[-1] < 0 and fewer:
        return token_schedule(kind, steps - 1, tokens, fewer=True)
    if counts[-1] < 0:
        raise ValueError(
            f"{steps} cosine steps are too many for {tokens} tokens; take fewer, or linear"
        )
    return counts


def temperature_schedule(kind: str, temperature: float, counts: list[int]) -> list[float]:
    """Temperature of each step of a token schedule.

    Args:
        kind: "constant"; "linear", which falls with the share of tokens still missing; or
            "onex:MIN:POWER", which falls to MIN like 1/x^POWER, such as "onex:0.5:0.5".
        temperature: At the start.
        counts: Tokens per step, from `token_schedule`.

    Raises:
        ValueError: the kind is none of these.
    """
    total = sum(counts)
    before = [sum(counts[:step]) / total for step in range(len(counts) + 1)]
    if kind == "constant":
        return [temperature] * len(counts)
    if kind == "linear":
        return [max(temperature * (1 - done), _FLOOR) for done in before[:-1]]
    least, power = _onex(kind)
    return [
        max(least + (temperature - least) * (1 - done) * _one_over_x(step, total, power), _FLOOR)
        for step, done in enumerate(before[1:])
    ]


def _onex(kind: str) -> tuple[float, float]:
    parts = kind.split(":")
    try:
        if parts[0] != "onex":
            raise ValueError(kind)
        least, power = map(float, parts[1:])
    except ValueError:
        raise ValueError(
            f"unknown temperature schedule {kind!r}; choose from constant, linear, onex:MIN:POWER"
        ) from None
    return least, power


def _one_over_x(index: int, entries: int, power: float) -> float:
    """Entry of the table 1/x^power over x in 1..100, shifted and scaled to 1..0."""
    if entries == 1 or power == 0:
        return 1.0
    x = 1 + (_TABLE_END - 1) * index / (entries - 1)
    last = _TABLE_END**-power
    return (x**-power - last) / (1 - last)
