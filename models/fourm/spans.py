"""Span masking of text (T5's, as 4M uses it), vectorised over a batch.

B samples, L positions. Every maximal run of removed tokens becomes the next sentinel in the input;
the target lists each sentinel with its run and ends with the next unused sentinel. Sequences are
rectangles padded with 0 beside their lengths. Where facts come in chunks of tokens, the tokens of a
chunk share their fate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.fourm.spec import NUM_SENTINELS, PAD_ID, SENTINEL_0

Ragged = tuple[np.ndarray, np.ndarray]
"""ids [B,L] and lengths [B]."""
RETRY_DECAY = 0.9


def span_mask(ids: np.ndarray, length: np.ndarray, keep: np.ndarray) -> tuple[Ragged, Ragged]:
    """Splits sequences ids [B,L] by keep [B,L] (True stays) into (inputs, targets)."""
    inside = np.arange(ids.shape[1]) < length[:, None]
    kept, removed = inside & keep, inside & ~keep
    starts = removed.copy()
    starts[:, 1:] &= ~removed[:, :-1]
    sentinel = np.cumsum(starts, 1) + SENTINEL_0
    inputs = _front(kept | starts, np.where(kept, ids, sentinel))
    # Before each position there is room for its sentinel, and one more behind all.
    pairs = np.zeros((len(ids), 2 * ids.shape[1] + 1), np.int64)
    used = np.ones(pairs.shape, bool)
    pairs[:, :-1:2], pairs[:, 1::2] = sentinel, ids
    used[:, :-1:2], used[:, 1::2] = starts, removed
    pairs[:, -1] = starts.sum(1) + SENTINEL_0 + 1
    return inputs, _front(used, pairs)


def _front(used: np.ndarray, values: np.ndarray) -> Ragged:
    """The used [B,L] ones of values [B,L], in order, and how many there are."""
    count = used.sum(1)
    out = np.full((len(used), int(count.max(initial=0))), PAD_ID, np.int64)
    out[np.arange(out.shape[1]) < count[:, None]] = values[used]
    return out, count


def input_length(length: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Length [B] of the inputs `span_mask` would give: what stays, and the first of each run that
    does not."""
    shown = keep.copy()
    shown[:, 1:] |= keep[:, :-1]
    shown[:, :1] = True
    shown &= np.arange(keep.shape[1]) < length[:, None]
    # A product counts booleans faster than a sum, and exactly as far as texts go.
    return (shown.astype(np.float32) @ np.ones(shown.shape[1], np.float32)).astype(np.int64)


def fit_inputs(
    ids: np.ndarray, length: np.ndarray, probability: np.ndarray, budget: np.ndarray,
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray], *, chunked: bool = False,
    most_ahead: int = 1,
) -> tuple[Ragged, Ragged]:
    """Span masks until every input fits its `budget` [B]: tokens stay with `probability` [B],
    lowered by a tenth at each new attempt; `draw(attempts, rows)` gives uniforms [n,L] for the
    numbers of attempts and rows, both [n].

    The first attempt that fits counts. Up to `most_ahead` of them are made at once: most rows need
    one, some dozens. With budget 0 the input is empty and everything is a target; of a sequence in
    chunks, whose facts need no context, only what would not have stayed, as released models were
    trained.
    """
    every, decay = np.arange(len(ids)), np.float32(RETRY_DECAY) ** np.arange(most_ahead)
    decay = decay.astype(np.float32)
    chance = probability.astype(np.float32)
    keep = draw(np.zeros(len(ids), int), every) < chance[:, None]
    keep &= (budget > 0)[:, None] | chunked
    done = (budget == 0) | (input_length(length, keep) <= budget)
    pending, first, ahead = np.flatnonzero(~done), 1, 1
    chance = chance[pending] * RETRY_DECAY
    while len(pending):
        rows, attempts = np.repeat(pending, ahead), np.tile(np.arange(ahead), len(pending))
        limit = np.repeat(chance, ahead) * decay[attempts]
        tried = draw(first + attempts, rows) < limit[:, None]
        fits = (input_length(length[rows], tried) <= budget[rows]).reshape(-1, ahead)
        found = fits.any(1)
        keep[pending[found]] = tried.reshape(*fits.shape, -1)[found, fits.argmax(1)[found]]
        pending, chance = pending[~found], chance[~found] * RETRY_DECAY**ahead
        first, ahead = first + ahead, min(2 * ahead, most_ahead)
    inputs, targets = span_mask(ids, length, keep)
    visible = np.where(budget > 0, inputs[1], 0)
    return (np.where(budget[:, None] > 0, inputs[0], PAD_ID), visible), targets


def cut_targets(targets: Ragged, budget: np.ndarray, choice: np.ndarray) -> Ragged:
    """Cuts targets longer than `budget` [B] ids to a stretch that starts at a sentinel.

    `choice` [B] is the index of the sentinel to start from; where less than the budget remains
    from there, the earliest sentinel whose rest fits is used. Sentinels inside text never occur:
    they are ids the text tokenizer does not emit.
    """
    ids, length = targets
    inside = np.arange(ids.shape[1]) < length[:, None]
    sentinel = inside & (ids > SENTINEL_0) & (ids < SENTINEL_0 + NUM_SENTINELS)
    number = np.cumsum(sentinel, 1) - 1
    last = np.maximum(1, sentinel.sum(1) - 1) - 1
    wanted = sentinel & (number == np.minimum(choice, last)[:, None])
    start = wanted.argmax(1)
    fits = sentinel & (length[:, None] - np.arange(ids.shape[1]) <= budget[:, None])
    start = np.where(length - start < budget, fits.argmax(1), start)
    start = np.where(length > budget, start, 0)
    length = np.minimum(length - start, budget)
    column = np.arange(ids.shape[1])
    shifted = np.take_along_axis(ids, np.minimum(column + start[:, None], ids.shape[1] - 1), 1)
    return np.where(column < length[:, None], shifted, PAD_ID), length


def fit_vectors(
    length: np.ndarray, width: int, probability: np.ndarray, budget: np.ndarray,
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray], *, most_ahead: int = 1,
) -> Ragged:
    """Span masks sequences of `length` [B] vectors as `fit_inputs` does, without targets.

    Returns indices [B,width] of the visible vectors, -1 for the zero vector that stands for a
    removed run, and how many are visible.
    """
    first = SENTINEL_0 + NUM_SENTINELS + width
    ids = np.broadcast_to(first + np.arange(width), (len(length), width))
    (inputs, visible), _ = fit_inputs(ids, length, probability, budget, draw,
                                      most_ahead=most_ahead)
    return np.where(inputs >= first, inputs - first, -1), visible


def shuffle_chunks(
    ids: np.ndarray, length: np.ndarray, chunk: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts the chunks of sequences ids [B,L] by order [B,L], which is equal within a chunk.

    `chunk` [B,L] numbers the chunk of each token. Returns ids and chunk numbers in the new order.
    """
    inside = np.arange(ids.shape[1]) < length[:, None]
    place = np.where(inside, order, np.inf).argsort(1, kind="stable")
    return np.take_along_axis(ids, place, 1), np.take_along_axis(chunk, place, 1)


def cut_chunks(length: np.ndarray, chunk: np.ndarray, longest: int) -> np.ndarray:
    """Lengths [B] of sequences without the chunks that end behind `longest` tokens."""
    place = np.arange(chunk.shape[1])
    inside = place < length[:, None]
    ends = np.ones(chunk.shape, bool)
    ends[:, :-1] = chunk[:, :-1] != chunk[:, 1:]
    ends |= place == length[:, None] - 1
    end = np.where(ends, place + 1, chunk.shape[1])
    end = np.minimum.accumulate(end[:, ::-1], 1)[:, ::-1]
    return (inside & (end <= longest)).sum(1)


def merge_spans(inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Puts a span-masked sequence together again: each sentinel of the inputs is replaced by the
    target tokens that follow the same sentinel, by nothing where the targets lack it."""
    runs: dict[int, list[int]] = {}
    run: list[int] = []
    for token in targets:
        if SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS:
            run = runs.setdefault(token, [])
        else:
            run.append(token)
    merged: list[int] = []
    for token in inputs:
        sentinel = SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS
        merged += runs.get(token, []) if sentinel else [token]
    return merged
