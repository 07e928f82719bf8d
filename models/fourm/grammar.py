"""Which tokens may come next, so that what a model writes can always be read.

A grammar is an automaton over token ids. It also counts how many tokens are left, so that no
sequence ends in the middle of a box, remembers values that later ones must not fall below, and
which entries there were already. R rows, V vocabulary, C classes of ids that no rule tells apart.

    grammar = grammar_for("det", text, vocab_size)
    state = grammar.start(rows, device)
    mask = grammar.allowed(state, left)      # bool [R, V]
    state = grammar.advance(state, ids)      # ids that were allowed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.fourm.conditions import LAST
from models.fourm.spec import EOS_ID, UNKNOWN_ID

if TYPE_CHECKING:
    from tokenizers_vq.text import TextTokenizer

_REGISTERS = 2
_FAR = 1 << 30


@dataclass(frozen=True)
class Rule:
    """From state `source` the ids first..first+count-1 lead to state `target`."""

    source: int
    first: int
    count: int
    target: int
    keep: int = -1
    """Register that remembers which of the ids it was."""
    least: int = -1
    """Register whose value it must not fall below."""
    once: int = -1
    """Number of an entry that a sequence holds at most once, 0..62."""


@dataclass(frozen=True)
class Progress:
    """How far each row has come: states [R], registers [R, 2], entries seen as bits [R]."""

    states: Tensor
    registers: Tensor
    seen: Tensor

    def rows(self, index: Tensor) -> Progress:
        """The rows picked by `index`."""
        return Progress(self.states[index], self.registers[index], self.seen[index])


class Grammar:
    """An automaton that starts in state 0 and has finished after [EOS] and [S_2].

    Args:
        rules: Its transitions; from one state an id leads to one other.
        vocab_size: Ids that the model may give.

    Raises:
        ValueError: two rules of a state share an id, or an id is beyond the vocabulary.
    """

    def __init__(self, rules: Sequence[Rule], vocab_size: int) -> None:
        edges = sorted({0, vocab_size, *(r.first for r in rules), *(r.first + r.count
                                                                   for r in rules)})  # fmt: skip
        if edges[0] < 0 or edges[-1] > vocab_size:
            raise ValueError(f"a grammar needs ids up to {edges[-1] - 1}, there are {vocab_size}")
        starts = torch.tensor(edges[:-1])
        self.class_of = torch.searchsorted(starts, torch.arange(vocab_size), right=True) - 1
        states = 1 + max(max(rule.source, rule.target) for rule in rules)
        shape = states, len(starts)
        self.goto, self.keep, self.least, self.once, self.first = (
            torch.full(shape, -1) for _ in range(5)
        )
        for rule in rules:
            row = rule.source
            for part in range(edges.index(rule.first), edges.index(rule.first + rule.count)):
                if self.goto[row, part] >= 0:
                    raise ValueError(f"the id {edges[part]} would lead to two states")
                self.goto[row, part], self.first[row, part] = rule.target, rule.first
                self.keep[row, part], self.least[row, part] = rule.keep, rule.least
                self.once[row, part] = rule.once
        self.need = self._distances(rules, states)

    @staticmethod
    def _distances(rules: Sequence[Rule], states: int) -> Tensor:
        """Least tokens [S] from each state through [EOS]."""
        need = [_FAR] * states
        for rule in rules:
            if rule.first == LAST:
                need[rule.source] = need[rule.target] = 0
        changed = True
        while changed:
            changed = False
            for rule in rules:
                if need[rule.target] + 1 < need[rule.source]:
                    need[rule.source], changed = need[rule.target] + 1, True
        return torch.tensor(need)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence, [EOS] among them."""
        return int(self.need[0])

    def _to(self, device: torch.device) -> None:
        if self.goto.device != device:
            for name, value in list(vars(self).items()):
                setattr(self, name, value.to(device))

    def start(self, rows: int, device: torch.device) -> Progress:
        """The beginning of `rows` sequences."""
        self._to(device)
        zeros = torch.zeros(rows, _REGISTERS + 2, dtype=torch.long, device=device)
        return Progress(zeros[:, 0], zeros[:, 1:-1], zeros[:, -1])

    def allowed(self, progress: Progress, left: int) -> Tensor:
        """Ids that may come next, bool [R, V], of which there is at least one.

        Args:
            progress: Where the rows are.
            left: Tokens that still fit, the next one included.
        """
        goto, once = self.goto[progress.states], self.once[progress.states]
        fits = (goto >= 0) & (self.need[goto.clamp(min=0)] < left)
        again = (progress.seen.unsqueeze(1) >> once.clamp(min=0)) & 1
        mask = (fits & ~((once >= 0) & again.bool()))[:, self.class_of]
        # A rule with a register is the only one of its state, so one bound a row is enough.
        least, place = self.least[progress.states].max(1)
        bound = self.first[progress.states].gather(1, place.unsqueeze(1))
        bound = bound + progress.registers.gather(1, least.clamp(min=0).unsqueeze(1))
        ids = torch.arange(len(self.class_of), device=mask.device)
        return mask & ((least < 0).unsqueeze(1) | (ids >= bound))

    def advance(self, progress: Progress, ids: Tensor) -> Progress:
        """Where the rows are after the allowed ids [R]."""
        part = self.class_of[ids]
        cell = progress.states, part
        offset, keep, once = ids - self.first[cell], self.keep[cell], self.once[cell]
        slots = torch.arange(_REGISTERS, device=ids.device)
        registers = torch.where(slots == keep.unsqueeze(1), offset.unsqueeze(1),
                                progress.registers)  # fmt: skip
        bit = torch.ones_like(once) << once.clamp(min=0)
        seen = torch.where(once >= 0, progress.seen | bit, progress.seen)
        return Progress(self.goto[cell], registers, seen)


class _Rules:
    """Rules under construction; every method returns the state that it leads to."""

    def __init__(self, text: TextTokenizer) -> None:
        self.text = text
        self.rules: list[Rule] = []
        self._states = 1
        self._words: dict[tuple[int, int], int] = {}

    def state(self) -> int:
        """A new state."""
        self._states += 1
        return self._states - 1

    def ids(self, source: int, first: int, count: int, target: int | None = None,
            **more: int) -> int:  # fmt: skip
        """One of the ids from `first` on."""
        target = self.state() if target is None else target
        self.rules.append(replace(Rule(source, first, count, target), **more))
        return target

    def number(self, source: int, axis: int, count: int, target: int | None = None,
               **more: int) -> int:  # fmt: skip
        """One of `v{axis}=0` to `v{axis}={count - 1}`."""
        self.need(count)
        return self.ids(source, self.text.coordinate_id(axis, 0), count, target, **more)

    def need(self, bins: int) -> None:
        """Raises ValueError where the text tokenizer has fewer coordinate bins."""
        if bins > self.text.bins:
            raise ValueError(f"the text tokenizer has {self.text.bins} coordinate bins, the "
                             f"grammar needs {bins}")  # fmt: skip

    def numbers(self, source: int, count: int, times: int, target: int | None = None) -> int:
        """`v0=` below `count`, several times."""
        for left in range(times - 1, -1, -1):
            source = self.number(source, 0, count, None if left else target)
        return source

    def word(self, source: int, word: str, target: int | None = None) -> int:
        """A word, of however many pieces."""
        pieces = self.text.encode(word)
        if UNKNOWN_ID in pieces:
            raise ValueError(f"the text tokenizer cannot write {word!r}, which the grammar needs")
        for number, piece in enumerate(pieces):
            final = number == len(pieces) - 1
            known = self._words.get((source, piece))
            if known is None or final:
                known = self.ids(source, piece, 1, target if final else None)
                self._words[source, piece] = known
            source = known
        return source

    def box(self, source: int) -> int:
        """An upright box."""
        bins = self.text.bins
        source = self.number(source, 0, bins, keep=0)
        source = self.number(source, 1, bins, keep=1)
        source = self.number(source, 2, bins, least=0)
        return self.number(source, 3, bins, least=1)

    def end(self, source: int) -> None:
        """[EOS], then [S_2]."""
        self.ids(self.ids(source, EOS_ID, 1), LAST, 1)


def boxes(text: TextTokenizer) -> list[Rule]:
    """`v0 v1 v2 v3 class`, any number of times; v2 >= v0 and v3 >= v1.

    Raises:
        ValueError: classes are no tokens of this tokenizer.
    """
    rules = _Rules(text)
    ids = sorted(i for name in text.class_names
                 if (i := text.inner.token_to_id(name)) is not None)  # fmt: skip
    if not ids:
        raise ValueError("boxes have no grammar: the text tokenizer has no class names")
    named = rules.box(0)
    for i in ids:
        rules.ids(named, i, 1, 0)
    rules.end(0)
    return rules.rules


PALETTE_COLOURS, COLOUR_LEVELS = 7, 256


def palette(text: TextTokenizer) -> list[Rule]:
    """`v1=n`, n colours from 1 to 7, then three `v0=` in 0..255 (fewer bins: all) for each."""
    rules, levels = _Rules(text), min(COLOUR_LEVELS, text.bins)
    rules.need(PALETTE_COLOURS + 1)
    done = rules.state()
    ready = {0: done}
    for colours in range(1, PALETTE_COLOURS + 1):
        ready[colours] = rules.state()
        rules.numbers(ready[colours], levels, 3, ready[colours - 1])
        rules.ids(0, text.coordinate_id(1, colours), 1, ready[colours])
    rules.end(done)
    return rules.rules


METADATA_LEVELS = (
    *(1000,) * 9, *(50,) * 7, 1000, *(50,) * 2, 2, 3,
)  # fmt: skip
"""Values of each of the 21 types of metadata, as the released sets write them."""


def metadata(text: TextTokenizer) -> list[Rule]:
    """`v1=type v0=value` in any order, every type at most once, values within its range."""
    rules = _Rules(text)
    rules.need(len(METADATA_LEVELS))
    ranges: dict[int, int] = {}
    for kind, levels in enumerate(METADATA_LEVELS):
        fitting = min(levels, text.bins)
        if fitting not in ranges:
            ranges[fitting] = rules.state()
            rules.number(ranges[fitting], 0, fitting, 0)
        rules.ids(0, text.coordinate_id(1, kind), 1, ranges[fitting], once=kind)
    rules.end(0)
    return rules.rules


POSE_CODES, POSE_WORDS = 512, 8
_POSE_NUMBERS = {"global": 9, "shape": 10, "camera": 3}


def poses(text: TextTokenizer) -> list[Rule]:
    """`none`, or for each person `human`, a box, then pose, global, shape, camera in any order."""
    rules = _Rules(text)
    bare = rules.word(0, "none")
    rules.end(bare)
    person = rules.state()
    rules.word(0, "human", person)
    names = ("pose", *_POSE_NUMBERS)
    told = {0: rules.box(person)}
    for done in range(1, 1 << len(names)):
        told[done] = rules.state()
    for done in range((1 << len(names)) - 1):
        for number, name in enumerate(names):
            if done & 1 << number:
                continue
            inside, target = rules.word(told[done], name), told[done | 1 << number]
            if name != "pose":
                rules.numbers(inside, text.bins, _POSE_NUMBERS[name], target)
                continue
            for left in range(POSE_WORDS - 1, -1, -1):
                following = target if not left else rules.state()
                rules.number(inside, 0, POSE_CODES, following)
                rules.number(inside, 1, POSE_CODES, following)
                inside = following
    everything = told[(1 << len(names)) - 1]
    rules.word(everything, "human", person)
    rules.end(everything)
    return rules.rules


KEYPOINTS = 17


def keypoints(text: TextTokenizer) -> list[Rule]:
    """`none`, or for each person `human`, a box, `pose`, then 17 times `v0 v1` or `none`."""
    rules = _Rules(text)
    rules.end(rules.word(0, "none"))
    person = rules.word(0, "human")
    at = rules.word(rules.box(person), "pose")
    for _ in range(KEYPOINTS):
        following = rules.state()
        rules.number(rules.number(at, 0, text.bins), 1, text.bins, following)
        at = rules.word(at, "none", following)
    rules.word(at, "human", person)
    rules.end(at)
    return rules.rules


GRAMMARS: dict[str, Callable[[TextTokenizer], list[Rule]]] = {
    "det": boxes, "color_palette": palette, "metadata": metadata, "human_poses": poses,
    "keypoints": keypoints,
}  # fmt: skip
"""Grammars by the name of their modality, or of its text form: `human_poses` is the released one
of body models, `keypoints` that of our labels."""


def grammar_for(name: str, text: TextTokenizer, vocab_size: int) -> Grammar:
    """The grammar of a sequence modality.

    Args:
        name: A key of `GRAMMARS`, such as "det".
        text: Names the ids.
        vocab_size: Ids that the model may give.

    Raises:
        ValueError: the modality has none, or the tokenizer lacks what it needs.
    """
    if name not in GRAMMARS:
        raise ValueError(f"{name!r} has no grammar; choose from {', '.join(GRAMMARS)}")
    return Grammar(GRAMMARS[name](text), vocab_size)
