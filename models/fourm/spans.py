"""Span masking of text (T5's, as 4M uses it), vectorised over a batch.

B samples, L positions. Every maximal run of removed tokens becomes the next sentinel in the input;
the target lists each sentinel with its run and ends with the next unused sentinel. Sequences are
rectangles padded with 0 beside their lengths. Where facts come in chunks of tokens, the tokens of a
chunk share their fate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from models.fourm.spec import NUM_SENTINELS, PAD_ID, SENTINEL_0

Ragged = tuple[np.ndarray, np.ndarray]
"""ids [B,L] and lengths [B]."""
RETRY_DECAY = 0.9


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Numbers [n] of stretches that begin at `first` [B] and have `count` [B] numbers each, one
    stretch behind another."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(count.sum())


def span_mask(ids: np.ndarray, length: np.ndarray, keep: np.ndarray) -> tuple[Ragged, Ragged]:
    """Splits sequences ids [B,L] by keep [B,L] (True stays) into (inputs, targets)."""
    size, width = ids.shape
    inside = np.arange(width) < length[:, None]
    removed = inside & ~keep
    starts = removed.copy()
    starts[:, 1:] = removed[:, 1:] > removed[:, :-1]
    runs, gone = starts.sum(1), removed.sum(1)
    place = np.flatnonzero(removed)
    opens = starts.reshape(-1)[place]
    sentinel = ranges(np.full(size, SENTINEL_0 + 1), runs)
    shown = ids.copy()
    shown.reshape(-1)[place[opens]] = sentinel
    # In a row of targets, each run makes room for its sentinel, and one more ends all.
    total = gone + runs + 1
    targets = np.full((size, int(total.max(initial=0))), PAD_ID, np.int64)
    first = np.arange(size) * targets.shape[1]
    before = np.cumsum(gone + runs) - gone - runs
    after = np.arange(len(place)) + np.cumsum(opens) + np.repeat(first - before, gone)
    flat = targets.reshape(-1)
    flat[after], flat[after[opens] - 1] = ids.reshape(-1)[place], sentinel
    flat[first + total - 1] = runs + SENTINEL_0 + 1
    return _front(inside & (keep | starts), shown), (targets, total)


def _front(used: np.ndarray, values: np.ndarray) -> Ragged:
    """The used [B,L] ones of values [B,L], in order, and how many there are."""
    count = used.sum(1)
    out = np.full((len(used), int(count.max(initial=0))), PAD_ID, np.int64)
    slots = ranges(np.arange(len(used)) * out.shape[1], count)
    out.reshape(-1)[slots] = values.reshape(-1)[np.flatnonzero(used)]
    return out, count


def _bits(flags: np.ndarray) -> np.ndarray:
    """Flags [n,L] as uint64 [n, L / 64], the first one in the lowest bit."""
    size, width = flags.shape
    whole = np.zeros((size, -(-width // 64) * 64), bool)
    whole[:, :width] = flags
    return np.packbits(whole, bitorder="little").view("<u8").reshape(size, -(-width // 64))


def _input_length(inside: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Length [n] of the inputs `span_mask` would give: what stays, and the first of each run that
    does not. What is inside a sequence and what stays are bits [n,w]."""
    shown = keep << 1
    shown[:, 1:] |= keep[:, :-1] >> 63
    shown[:, 0] |= 1
    shown |= keep
    shown &= inside
    return np.bitwise_count(shown).sum(1, dtype=np.int64)


def _lowered(chance: np.ndarray, most_ahead: int) -> Iterator[np.ndarray]:
    """Chances [n,attempts], float32, of the attempts that follow one with `chance` [n], each lower
    than the one before: up to `most_ahead` of them at a time, without end."""
    decay = (np.float32(RETRY_DECAY) ** np.arange(most_ahead)).astype(np.float32)
    chance, ahead, parts = chance * RETRY_DECAY, 1, []
    while True:
        # Rounding is that of 1, 2, 4, ... attempts at a time.
        parts.append(chance[:, None] * decay[:ahead])
        chance = chance * RETRY_DECAY**ahead
        if 2 * ahead >= most_ahead:
            yield np.concatenate(parts, 1)
            parts = []
        ahead = min(2 * ahead, most_ahead)


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
    every, chance = np.arange(len(ids)), probability.astype(np.float32)
    inside = _bits(np.arange(ids.shape[1]) < length[:, None])
    keep = draw(0 * every, every) < chance[:, None]
    keep[budget == 0] &= chunked
    done = (budget == 0) | (_input_length(inside, _bits(keep)) <= budget)
    pending, first = np.flatnonzero(~done), 1
    left = np.arange(len(pending))
    for chances in _lowered(chance[pending], most_ahead):
        if not len(left):
            break
        some, ahead = pending[left], chances.shape[1]
        rows, attempts = np.repeat(some, ahead), np.tile(np.arange(first, first + ahead), len(some))
        tried = draw(attempts, rows) < chances[left].reshape(-1, 1)
        fits = (_input_length(inside[rows], _bits(tried)) <= budget[rows]).reshape(-1, ahead)
        found = fits.any(1)
        keep[some[found]] = tried.reshape(*fits.shape, -1)[found, fits.argmax(1)[found]]
        left, first = left[~found], first + ahead
    (shown, visible), targets = span_mask(ids, length, keep)
    shown[budget == 0], visible[budget == 0] = PAD_ID, 0
    return (shown, visible), targets


def starts(ids: np.ndarray) -> np.ndarray:
    """Sentinels [B] that a cut of targets `ids` [B,L] can start from: all but the closing one."""
    return ((ids > SENTINEL_0) & (ids < SENTINEL_0 + NUM_SENTINELS)).sum(1) - 1


def cut_targets(targets: Ragged, budget: np.ndarray, choice: np.ndarray) -> Ragged:
    """Cuts targets longer than `budget` [B] ids to a stretch that starts at a sentinel.

    `choice` [B] is the index of the sentinel to start from; where less than the budget remains
    from there, the earliest sentinel whose rest fits is used. Sentinels inside text never occur:
    they are ids the text tokenizer does not emit.
    """
    ids, length = targets
    long = np.flatnonzero(length > budget)
    some, room, width = ids[long], length[long] - budget[long], ids.shape[1]
    place = np.flatnonzero((some > SENTINEL_0) & (some < SENTINEL_0 + NUM_SENTINELS))
    row = np.arange(len(long)) * width
    first, end = np.searchsorted(place, row), np.searchsorted(place, row + width)
    # The closing sentinel starts nothing.
    wanted = first + np.minimum(choice[long], np.maximum(end - first - 2, 0))
    wanted = np.where(place[wanted] > row + room, np.searchsorted(place, row + room), wanted)
    start = np.zeros_like(length)
    start[long] = place[wanted] - row
    length = np.minimum(length - start, budget)
    cut, row = np.full_like(ids, PAD_ID), np.arange(len(ids)) * width
    cut.reshape(-1)[ranges(row, length)] = ids.reshape(-1)[ranges(row + start, length)]
    return cut, length


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
