"""Evaluation of a trained 4M on pictures that it never saw.

Every task gets the same rows: the best constant, the teacher that labelled the training set, the
bound that tokens set, 4M with one sample, and 4M with several combined. `gap_recovered` is where
4M lies between the constant (0) and the teacher (1).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from infra.manifest import load_manifest
from infra.store import Store
from tasks.chain import Chain
from tasks.generate import load_generator

if TYPE_CHECKING:
    from PIL import Image

    from models.labelers import Labeler
    from tasks.evaluation.rows import Bench
    from tasks.evaluation.truth import Truth

log = logging.getLogger("fourm.evaluate")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and on how much. Raises ValueError for numbers that cannot work."""

    scenes: int = 256
    """Pictures that are evaluated."""
    samples: int = 10
    """Samples that are combined in the row fourm_10."""
    truth: Literal["scenes", "labels"] = "scenes"
    """Truth of fresh scenes; or, for other pictures, the labels of the validation split."""
    manifest: str = "main"
    """Manifest whose validation split is used where the truth are labels."""
    pictures: int = 96
    """Pictures generated, times samples, for each task to RGB."""
    training: int = 400
    """Labels of the training split that the constant baseline is made from."""
    shown: int = 8
    """Samples on contact sheets."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        for name in ("scenes", "samples", "pictures", "training", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.truth not in ("scenes", "labels"):
            raise ValueError(f"truth must be scenes or labels, got {self.truth!r}")


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        tasks: The record of each task, as `results.json` holds it.
        matrix: {input: {target: mean loss per token}}.
        retrieval: Searches by predicted embeddings, see `tasks.evaluation.retrieval`.
        chain: A chain through many modalities, see `tasks.evaluation.journey`.
        teachers: Each labeler's model, and its scores where the truth is known.
        tokenizers: The record of each tokenizer.
        captions: Captions to show.
        pictures: Contact sheets by name.
        notes: Lines under a picture, such as the captions asked for.
        config: What was asked.
        seconds: What it took.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    matrix: dict[str, dict[str, float]] = field(default_factory=dict)
    retrieval: dict[str, dict[str, Any]] = field(default_factory=dict)
    chain: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    captions: list[dict[str, str]] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate(
    store: Store, run: str, config: EvaluateConfig, on_progress: Progress | None = None
) -> Evaluation:
    """Measures the model of a training run.

    Args:
        store: The dataset that it was trained on.
        run: Name of the run.
        config: What is measured.
        on_progress: Called with (done, total, what comes next).

    Raises:
        ValueError: the run or what it was made from does not exist.
    """
    from tasks.evaluation.journey import journey
    from tasks.evaluation.matrix import loss_matrix
    from tasks.evaluation.retrieval import retrieval

    began = time.monotonic()
    bench = prepare(store, run, config)
    out = Evaluation(config={"run": run, **asdict(config)})
    from_rgb, to_rgb = bench.tasks_from_rgb(), bench.tasks_to_rgb()
    total = len(from_rgb) + len(to_rgb) + 4
    pictures = min(config.pictures, len(bench.truth))
    tell = on_progress or (lambda done, total, text: None)
    for task in from_rgb:
        tell(len(out.tasks), total, task.name)
        out.tasks[task.name] = _logged(task.name, bench.from_rgb(task))
    for task in to_rgb:
        tell(len(out.tasks), total, task.name)
        out.tasks[task.name] = _logged(task.name, bench.to_rgb(task, pictures))
    tell(total - 4, total, "retrieval")
    out.retrieval = retrieval(bench)
    tell(total - 3, total, "a chain")
    out.chain = journey(bench, pictures)
    tell(total - 2, total, "losses between modalities")
    out.matrix = loss_matrix(bench.generator, _token_values(bench))
    tell(total - 1, total, "pictures")
    _show(out, bench, config)
    chain = Chain(store)
    out.teachers = _teachers(chain, out.tasks)
    out.tokenizers = {name: asdict(info) for name, info in chain.tokenizers.items()}
    out.seconds = round(time.monotonic() - began, 1)
    tell(total, total, "done")
    return out


def prepare(store: Store, run: str, config: EvaluateConfig) -> Bench:
    """Loads the model, the teachers, the truth and the training labels."""
    from tasks.evaluation.rows import Bench
    from tasks.evaluation.truth import read_centred

    chain = Chain(store)
    generator = load_generator(store, run, bf16=None)
    manifest = load_manifest(store, config.manifest)
    teachers = _load_teachers(chain)
    truth = _truth(chain, teachers, manifest.shards("val"), config)
    wanted = ["rgb", *(name for name in truth.values if name in chain.sources)]
    training = read_centred(chain, wanted, manifest.shards("train"), config.training)
    return Bench(generator, teachers, truth, training, config.samples, config.seed)


def _truth(
    chain: Chain, teachers: dict[str, Labeler], held_out: list[int], config: EvaluateConfig
) -> Truth:
    """What nobody but a labeler knows of a scene - its edges, its features - is what that says."""
    from tasks.evaluation.scores import MEASURED
    from tasks.evaluation.teachers import told
    from tasks.evaluation.truth import label_truth, scene_truth

    if config.truth == "labels":
        return label_truth(chain, MEASURED, held_out, config.scenes)
    truth = scene_truth(config.scenes, chain.crops.size)
    values = told({"rgb": truth.rgb, **truth.values}, teachers, MEASURED)
    del values["rgb"]
    return replace(truth, values=values)


def _load_teachers(chain: Chain) -> dict[str, Labeler]:
    from models.labelers import load_labeler

    teachers: dict[str, Labeler] = {}
    for spec in chain.labelers.values():
        labeler = load_labeler(spec)
        teachers |= dict.fromkeys(spec.outputs, labeler)
    return teachers


def _token_values(bench: Bench) -> dict[str, list[Any]]:
    """Values as the model was trained on them: the teachers' labels of the pictures."""
    known = set(bench.generator.inputs) | set(bench.generator.targets)
    said = {name: values for name, values in bench.said.items() if name in known}
    return {"rgb": bench.truth.rgb, **said}


def _show(out: Evaluation, bench: Bench, config: EvaluateConfig) -> None:
    from tasks.evaluation.journey import chain_sheet
    from tasks.evaluation.retrieval import search_sheets
    from tasks.evaluation.sheets import (
        caption_rows,
        generation_sheets,
        moving_box,
        overview,
        prediction_sheets,
    )

    out.captions = caption_rows(bench, config.shown)
    out.pictures |= overview(bench)
    out.pictures |= prediction_sheets(bench, config.shown)
    out.pictures |= chain_sheet(bench, config.shown)
    out.pictures |= search_sheets(bench, config.shown)
    out.pictures |= generation_sheets(bench, config.shown)
    if "caption-to-rgb" in out.pictures:
        out.notes["caption-to-rgb"] = bench.truth.values["caption"][: config.shown]
    names = bench.generator.text.class_names
    if "det->rgb" in out.tasks and names:
        size = bench.truth.rgb[0].shape[0]
        out.pictures["moving-box"] = moving_box(bench.generator, names[:3], size)


def _teachers(chain: Chain, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from models.labelers import weights_revision

    found: dict[str, dict[str, Any]] = {}
    for name, spec in chain.labelers.items():
        found[name] = {"model": spec.model_id, "revision": weights_revision(spec)[:12]}
        record = tasks.get(f"rgb->{name}")
        if record:
            also = record["also"].get("teacher", {})
            found[name]["scores"] = {record["metric"]: record["teacher"], **also}
    return found


def _logged(name: str, record: dict[str, Any]) -> dict[str, Any]:
    log.info("%s: %s %s, gap recovered %s", name, record["metric"], record["fourm"],
             record["gap_recovered"])  # fmt: skip
    return record
