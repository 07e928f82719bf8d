"""The rows of the results table: who predicts what for the pictures of the truth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from models.fourm.decoding import Decoding
from models.fourm.ensemble import combine
from models.fourm.generate import Generator
from tasks.evaluation.baseline import constant
from tasks.evaluation.scores import (
    FROM_RGB,
    MEASURED,
    Scores,
    TaskScore,
    box_scores,
    caption_scores,
    class_f1,
    entry,
)
from tasks.evaluation.teachers import told
from tasks.evaluation.truth import Truth, Values

if TYPE_CHECKING:
    from models.labelers import Labeler

log = logging.getLogger("fourm.evaluate")

BATCH = 256
"""Rows run together, samples included."""

# Linear schedules: cosine ones do not exist for many steps over few tokens.
_GREEDY = Decoding(order="maskgit", steps=4, schedule="linear", temperature=0.0)
# One step draws every token from its own distribution: what such samples average to is what many
# steps would, at the price of one forward pass for all samples of a picture.
_SPREAD = Decoding(order="maskgit", steps=1, schedule="linear", temperature=1.0, top_p=0.95)
_PICTURE = Decoding(order="roar", steps=8, schedule="linear", temperature=1.0, top_p=0.9)
_WORDS = Decoding(order="autoregressive", temperature=0.0)
_SPREAD_WORDS = Decoding(order="autoregressive", temperature=0.7, top_p=0.95)



def one(generator: Generator) -> dict[str, Decoding]:
    """How the single sample of each target is decoded: what the model is most sure of."""
    return _decodings(generator, _GREEDY, _WORDS)


def many(generator: Generator) -> dict[str, Decoding]:
    """How samples that are averaged are decoded: they must differ."""
    return _decodings(generator, _SPREAD, _SPREAD_WORDS)


def _decodings(generator: Generator, grid: Decoding, words: Decoding) -> dict[str, Decoding]:
    found = {}
    for name in generator.targets:
        written = generator.spec(name, target=True).kind == "seq"
        found[name] = words if written else _PICTURE if name == "rgb" else grid
    # A tokenizer that was trained without boxes has no words for their classes.
    if "det" in found:
        named = bool(generator.text.class_names)
        found["det"] = replace(found["det"], well_formed=named)
    for name in found.keys() & {"color_palette", "metadata"}:
        found[name] = replace(found[name], well_formed=True)
    return found


@dataclass
class Predictions:
    """Predictions by task name, then row; kept for pictures."""

    values: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def keep(self, task: str, row: str, values: Sequence[Any]) -> None:
        """Remembers a row."""
        self.values.setdefault(task, {})[row] = list(values)


@dataclass
class Bench:
    """Everything that predicts.

    Attributes:
        generator: The trained model.
        teachers: Labelers by the modality that they write.
        truth: Pictures and their truth.
        training: Labels of the training set, for the constant baseline; "rgb" among them.
        samples: Samples that are averaged.
        seed: Of the first sample.
    """

    generator: Generator
    teachers: Mapping[str, Labeler]
    truth: Truth
    training: Values
    samples: int = 10
    seed: int = 0
    kept: Predictions = field(default_factory=Predictions)

    @cached_property
    def said(self) -> Values:
        """What the teachers say of the pictures, each knowing what those before it said."""
        wanted = set(MEASURED) | (set(self.generator.inputs) - {"rgb"})
        found = told({"rgb": self.truth.rgb}, self.teachers, sorted(wanted))
        return {name: values for name, values in found.items() if name != "rgb"}

    def values(self, name: str) -> list[Any]:
        """The truth of a modality, the pictures themselves among them."""
        return self.truth.rgb if name == "rgb" else self.truth.values[name]

    def tasks_from_rgb(self) -> list[TaskScore]:
        """Tasks from RGB that the model, its teachers and the truth allow."""
        able = set(self.generator.targets) & set(self.teachers) & set(self.truth.values)
        if "rgb" not in self.generator.inputs:
            return []
        return [task for task in FROM_RGB if task.target in able & set(self.training)]

    def from_rgb(self, task: TaskScore) -> dict[str, Any]:
        """The record of one task from RGB."""
        name, truth = task.target, self.truth
        fallback = constant(name, self.training[name], truth.similarity)
        predictions = {
            "constant": [fallback] * len(truth),
            "teacher": self.said[name],
            "tokenizer_bound": round_trip(self.generator, name, truth.values[name]),
            "fourm": self.predict("rgb", truth.rgb, name, 1),
            f"fourm_{self.samples}": self.predict("rgb", truth.rgb, name, self.samples),
        }
        rows: dict[str, Scores | None] = {}
        for row, values in predictions.items():
            self.kept.keep(task.name, row, values)
            rows["fourm_10" if row == f"fourm_{self.samples}" else row] = task.score(values, truth)
        return entry(task, rows)

    def predict(
        self, condition: str, values: Sequence[Any], target: str, count: int
    ) -> list[Any]:
        """A target from one modality: one sample, or `count` of them combined."""
        found = self.generator.generate(
            {condition: values}, [target], num_samples=count,
            settings=one(self.generator) if count == 1 else many(self.generator),
            seeds=[self.seed + i for i in range(len(values))], batch_size=BATCH,
            similarity=self.truth.similarity,
        )  # fmt: skip
        return found[target].values

    def tasks_to_rgb(self) -> list[TaskScore]:
        """Tasks to RGB that the model and its teachers allow."""
        if "rgb" not in self.generator.targets:
            return []
        able = set(self.generator.inputs) & set(self.teachers) & set(self.truth.values)
        return [task for task in TO_RGB if task.condition in able]

    def to_rgb(self, task: TaskScore, count: int) -> dict[str, Any]:
        """The record of one task to RGB, on the first `count` pictures.

        What counts is what the teacher finds in a picture. Ten samples are ten pictures, and
        what the teacher finds in them is combined as samples are.
        """
        truth = self.truth.first(count)
        asked = truth.values[task.condition]
        single = self.predict(task.condition, asked, "rgb", 1)
        found = self.generator.generate(
            {task.condition: asked}, ["rgb"], num_samples=self.samples,
            settings=many(self.generator), batch_size=BATCH,
            seeds=[self.seed + i for i in range(len(asked))],
        )["rgb"].samples  # fmt: skip
        mean = constant("rgb", self.training["rgb"], truth.similarity)
        pictures = {
            "constant": [mean], "teacher": truth.rgb,
            "tokenizer_bound": round_trip(self.generator, "rgb", truth.rgb), "fourm": single,
        }  # fmt: skip
        rows: dict[str, Scores | None] = {}
        for row, images in pictures.items():
            self.kept.keep(task.name, row, images)
            seen = self._see(task.condition, images)
            rows[row] = task.score(seen * count if row == "constant" else seen, truth)
        flat = self._see(task.condition, [image for group in found for image in group])
        groups = [flat[i : i + self.samples] for i in range(0, len(flat), self.samples)]
        merged = [combine(task.condition, group, truth.similarity) for group in groups]
        rows["fourm_10"] = task.score(merged, truth)
        return entry(task, rows)

    def _see(self, condition: str, images: Sequence[np.ndarray]) -> list[Any]:
        return self.teachers[condition].label([np.ascontiguousarray(i) for i in images])[condition]


def _asked_boxes(found: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    return {**box_scores(found, truth), "class_f1": class_f1(found, truth.values["det"])}


def _asked_captions(found: Sequence[str], truth: Truth) -> Scores:
    return caption_scores(found, truth)


TO_RGB = (
    TaskScore(condition="caption", target="rgb", metric="attributes", lower_is_better=False,
              score=_asked_captions),
    TaskScore(condition="det", target="rgb", metric="ap50", lower_is_better=False,
              score=_asked_boxes),
)  # fmt: skip


def round_trip(generator: Generator, name: str, values: Sequence[Any]) -> list[Any]:
    """Values encoded to tokens and decoded again: the best that any token predictor can reach."""
    text = generator.text
    if generator.form(name) is not None:
        ids = (text.encode(generator.written(name, value)) for value in values)
        return [generator.read(name, text.decode(line)) for line in ids]
    tokenizer = generator.tokenizers[name]
    return list(tokenizer.decode_tokens(tokenizer.encode_values(list(values))))
