"""Generation from files to files: `fourm generate --from rgb=photo.jpg --to depth,caption`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.backends import check_folder
from infra.machine import chosen_device
from infra.manifest import load_manifest
from infra.store import Store
from models import modalities
from tasks.generate_files import read_input, read_part, redrawn_area, write_value

if TYPE_CHECKING:
    from models.fourm.decoding import Decoding
    from models.fourm.generate import Generated, Generator, Guide
    from models.fourm.presets import Preset
    from models.fourm.spec import ModalitySpec

MODEL = "model"
"""Folder of a run that holds the finished model."""
EVERY = "*"
"""Stands for every target in `How.decoding`."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How results are sampled. Raises ValueError for settings that exclude each other."""

    samples: int = 1
    """Results of each target."""
    combine: bool = False
    """Whether to write what the samples agree on (means, votes, the most typical text) instead of
    each of them."""
    seed: int = 0
    """Of the first sample; the others count on from it."""
    preset: Preset = "plain"
    """See `models.fourm.presets.preset`."""
    guidance: float | None = None
    """Scale of guidance by all conditions; None: the preset's, 1: none."""
    guides: Sequence[tuple[Mapping[str, str], float]] = ()
    """Further conditions, as files or texts, that pull (weight above 0) or push away (below 0)."""
    decoding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Target, or "*" for all -> fields of `models.fourm.decoding.Decoding` that differ from the
    preset's."""
    known: Mapping[str, str] = field(default_factory=dict)
    """Input -> the part of it that is given, a box or a mask picture. Of a target itself the rest
    is generated."""
    redraw: str = ""
    """The part of the picture "rgb" that is drawn anew, the rest being kept: a box
    "xmin,ymin,xmax,ymax" in 0..1, a mask picture that is white there, or the boxes before an edit
    (a file, or JSON), which are compared with the input "det". Its only target is "rgb"."""
    upscale: str = ""
    """Run of a super-resolution model that makes the results again, finer; empty: none."""

    def __post_init__(self) -> None:
        if self.guides and self.guidance is not None:
            raise ValueError("guides take the place of a guidance scale: give one of them")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


def runs(store: Store) -> list[str]:
    """Runs that hold a finished model, sorted."""
    suffix = f"/{MODEL}/config.json"
    return sorted(
        path.removeprefix("runs/").removesuffix(suffix)
        for path in store.list("runs/")
        if path.endswith(suffix)
    )


def only_run(store: Store) -> str:
    """The one run that holds a model. Raises ValueError where there is none, or several."""
    found = runs(store)
    if not found:
        raise ValueError(f"{store.url} holds no trained model; run `fourm train` first")
    if len(found) > 1:
        raise ValueError(f"several runs hold a model: choose one of {', '.join(found)}")
    return found[0]


def load_generator(store: Store, run: str, *, bf16: bool | None = False) -> Generator:
    """The model of a run with its tokenizers, on a GPU where there is one; for `bf16` see
    `Generator`.

    Raises:
        ValueError: there is no such finished run; lists those there are.
    """
    from models.fourm.checkpoint import load_stored
    from models.fourm.generate import Generator, base_name
    from tasks.train_tokenizers import TEXT
    from tokenizers_vq.text import FILE, TextTokenizer
    from tokenizers_vq.tokenizer import load_tokenizer

    found = runs(store)
    if run not in found:
        have = f"there are {', '.join(found)}" if found else "run `fourm train` first"
        raise ValueError(f"no finished run {run!r} in {store.url}; {have}")
    model = load_stored(store, f"runs/{run}/{MODEL}")
    # Of the manifest it was trained on: the dataset may have other tokenizers by now.
    manifest = load_manifest(store, *store.read_json(f"runs/{run}/run.json")["manifest"])
    paths = {name: entry["path"] for name, entry in manifest.tokenizers.items() if "path" in entry}
    used = {base_name(s.name) for s in model.config.modalities if s.kind == "img" or _in_codes(s)}
    missing = sorted(used - set(paths))
    if missing:
        raise ValueError(f"run {run!r} needs a tokenizer of {missing[0]!r}, which is not there")
    tokenizers = {name: load_tokenizer(store, paths[name]) for name in used}
    text = TextTokenizer.from_bytes(store.read(f"{paths[TEXT]}/{FILE}"))
    return Generator(model, tokenizers, text, bf16=bf16).to(chosen_device())


def _in_codes(spec: ModalitySpec) -> bool:
    """Whether a sequence tells codes of a learned tokenizer."""
    form = modalities.text_form(spec.name)
    return form is not None and form.parts is not None


def generate(
    store: Store, run: str, inputs: Mapping[str, str], targets: Sequence[str],
    out_dir: str | Path, how: How | None = None,
) -> list[Path]:  # fmt: skip
    """Predicts modalities from others and writes them as files.

    Args:
        store: The dataset of the run.
        run: Name of the run; "" is the only one there is.
        inputs: Modality to a file of it, or to text: a caption, or boxes as JSON. A caption may
            hold ___ for words that are not known, and be a target, too.
        targets: Modalities to predict; each becomes a condition of the next.
        out_dir: Where files go: <modality>.png, caption.txt, det.json and so on.
        how: How results are sampled.

    Returns:
        The files written.

    Raises:
        ValueError: a modality, run or file does not exist or cannot be read; lists the choices.
    """
    how = how or How()
    generator = load_generator(store, run or only_run(store))
    upscaler = load_generator(store, how.upscale) if how.upscale else None
    if not inputs and not how.guides:
        raise ValueError(f"nothing to start from; choose from {', '.join(generator.inputs)}")
    for name in targets:
        generator.spec(name, target=True)
    _check(how, inputs, targets, upscaler)
    values = {name: read_input(generator, name, given) for name, given in inputs.items()}
    for name, area in how.known.items():
        values[name] = read_part(name, values[name], area)
    folder = Path(out_dir)
    check_folder(folder)  # what was generated would be lost without
    found = _generated(generator, values, targets, how)
    if upscaler:
        found |= _refined(upscaler, found, values, how)
    return _written(folder, found, targets, how, values.get("rgb"))


def _check(
    how: How, inputs: Mapping[str, str], targets: Sequence[str], upscaler: Generator | None
) -> None:
    """Refuses names that are none of this generation's."""
    for said, names, choices in (
        ("decoding", how.decoding, [*targets, EVERY]), ("known", how.known, list(inputs)),
    ):
        odd = [name for name in names if name not in choices]
        if odd:
            raise ValueError(f"{said} names {odd[0]!r}; choose from {', '.join(choices)}")
    if upscaler and not set(targets) & set(upscaler.refined):
        raise ValueError(f"run {how.upscale!r} refines {', '.join(upscaler.refined) or 'nothing'},"
                         f" none of {', '.join(targets)}")


def _generated(
    generator: Generator, values: Mapping[str, Any], targets: Sequence[str], how: How
) -> dict[str, Generated]:
    """All samples, a row each."""
    rows = {name: [value] * how.samples for name, value in values.items()}
    seeds = [how.seed + number for number in range(how.samples)]
    guides = [_guide(generator, conditions, weight, how.samples)
              for conditions, weight in how.guides]  # fmt: skip
    if not how.redraw:
        settings = _settings(generator, list(rows), targets, how)
        return generator.generate(rows, targets, settings=settings, seeds=seeds, guides=guides)
    area = redrawn_area(generator, values, targets, how.redraw)
    pictures = rows.pop("rgb")
    settings = _settings(generator, list(rows), targets, how)
    return {"rgb": generator.inpaint("rgb", pictures, area, rows, settings=settings, seeds=seeds,
                                     guides=guides)}  # fmt: skip


def _guide(
    generator: Generator, conditions: Mapping[str, str], weight: float, samples: int
) -> Guide:
    from models.fourm.generate import Guide

    values = {name: [read_input(generator, name, given)] * samples
              for name, given in conditions.items()}  # fmt: skip
    return Guide(values, weight)


def _refined(
    upscaler: Generator, found: Mapping[str, Generated], values: Mapping[str, Any], how: How
) -> dict[str, Generated]:
    """The same at a higher resolution, as far as the second model can."""
    conditions = {name: [value] * how.samples for name, value in values.items()
                  if name in upscaler.inputs and name not in found}  # fmt: skip
    targets = [name for name in found if name in upscaler.refined]
    seen = [spec.name for spec in upscaler.model.config.inputs]
    settings = _settings(upscaler, seen, targets, replace(how, guides=()))
    seeds = [how.seed + number for number in range(how.samples)]
    return upscaler.upscale(found, conditions, targets, settings=settings, seeds=seeds)


def _settings(
    generator: Generator, given: Sequence[str], targets: Sequence[str], how: How
) -> dict[str, Decoding]:
    from models.fourm.presets import changed, preset

    scale = 1.0 if how.guides else how.guidance
    found = {}
    for name in targets:
        spec = generator.spec(name, target=True)
        decoding = preset(how.preset, spec, given)
        if scale is not None:
            decoding = replace(decoding, guidance=scale)
        for which in (EVERY, name):
            decoding = changed(decoding, spec, how.decoding.get(which, {}),
                               all_targets=which == EVERY)  # fmt: skip
        found[name] = decoding
    return found


def _written(
    folder: Path, found: Mapping[str, Generated], targets: Sequence[str], how: How, seen: Any
) -> list[Path]:
    from models.fourm.ensemble import combine

    folder.mkdir(parents=True, exist_ok=True)
    picture = seen if isinstance(seen, np.ndarray) else None
    files = []
    for name in targets:
        values = list(found[name].values)
        if how.combine:
            values = [combine(name, values)]
        for number, value in enumerate(values):
            stem = name if len(values) == 1 else f"{name}-{number}"
            files += write_value(folder, stem, name, value, picture)
    return files
