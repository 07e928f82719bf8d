"""Generation from files to files: `fourm generate --from rgb=photo.jpg --to depth,caption`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.manifest import load_manifest
from infra.store import Store
from models import modalities

if TYPE_CHECKING:
    from models.fourm.decoding import Decoding
    from models.fourm.generate import Generator
    from models.fourm.spec import ModalitySpec

MODEL = "model"
"""Folder of a run that holds the finished model."""
_MAX_BYTES = 64 << 20


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


def load_generator(store: Store, run: str) -> Generator:
    """The model of a run with its tokenizers.

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
    return Generator(model, tokenizers, text)


def _in_codes(spec: ModalitySpec) -> bool:
    """Whether a sequence tells codes of a learned tokenizer."""
    form = modalities.text_form(spec.name)
    return form is not None and form.parts is not None


def generate(
    store: Store,
    run: str,
    inputs: Mapping[str, str],
    targets: Sequence[str],
    out_dir: str | Path,
    *,
    samples: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    redraw: str = "",
) -> list[Path]:
    """Predicts modalities from others and writes them as files.

    Args:
        store: The dataset of the run.
        run: Name of the run; "" is the only one there is.
        inputs: Modality to a file of it, or to text: a caption, or boxes as JSON.
        targets: Modalities to predict; each becomes a condition of the next.
        out_dir: Where files go: <modality>.png, caption.txt, det.json and so on.
        samples: Different results, each in its own files.
        guidance: Scale of guidance; None and 1 are none.
        seed: Of the first sample.
        redraw: The part of the picture "rgb" that is drawn anew, the rest being kept: a box
            "xmin,ymin,xmax,ymax" in 0..1, a mask picture that is white there, or the boxes before
            an edit (a file, or JSON), which are compared with the input "det". Its only target
            is "rgb".

    Returns:
        The files written.

    Raises:
        ValueError: a modality, run or file does not exist or cannot be read; lists the choices.
    """
    generator = load_generator(store, run or only_run(store))
    if not inputs:
        raise ValueError(f"nothing to start from; choose from {', '.join(generator.inputs)}")
    for name in targets:
        generator.spec(name, target=True)
    values = {name: read_input(generator, name, given) for name, given in inputs.items()}
    rows = {name: [value] * samples for name, value in values.items()}
    seeds = [seed + number for number in range(samples)]
    if redraw:
        area = _area(generator, values, targets, redraw)
        settings = _settings(generator, [n for n in inputs if n != "rgb"], targets, guidance)
        pictures = rows.pop("rgb")
        found = {"rgb": generator.inpaint("rgb", pictures, area, rows, settings=settings,
                                          seeds=seeds)}  # fmt: skip
    else:
        settings = _settings(generator, list(inputs), targets, guidance)
        found = generator.generate(rows, targets, settings=settings, seeds=seeds)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    picture = values.get("rgb")
    files = []
    for name in targets:
        for number, value in enumerate(found[name].values):
            stem = name if samples == 1 else f"{name}-{number}"
            files += _write(folder, stem, name, value, picture)
    return files


def _area(
    generator: Generator, values: Mapping[str, Any], targets: Sequence[str], redraw: str
) -> np.ndarray:
    """What is drawn anew, bool over the tokens or pixels of the picture."""
    from models.fourm.editing import box_area, changed_boxes

    if "rgb" not in values or list(targets) != ["rgb"]:
        raise ValueError("redraw changes a picture: it needs rgb as an input and as only target")
    spec = generator.spec("rgb", target=True)
    numbers = redraw.split(",")
    if len(numbers) == 4 and not redraw.lstrip().startswith("{"):
        try:
            return box_area([[float(number) for number in numbers]], spec.grid)
        except ValueError as error:
            raise ValueError(f"redraw {redraw!r}: {error}") from None
    if redraw.lstrip().startswith("{") or redraw.endswith(".json"):
        if "det" not in values:
            raise ValueError("redraw by boxes needs the boxes after the edit as the input det")
        before = read_input(generator, "det", redraw)
        return box_area(changed_boxes(before, values["det"]), spec.grid)
    return _square("rgb", _mask(redraw), len(values["rgb"]))[..., 0] > 127


def _mask(path: str) -> np.ndarray:
    try:
        return np.asarray(modalities.get("rgb").decode(_bytes(path)))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path!r} cannot be read as a mask picture: {error}") from None


def _settings(
    generator: Generator, given: Sequence[str], targets: Sequence[str], guidance: float | None
) -> dict[str, Decoding]:
    """The released sampler's settings; guidance only where it is asked for, because it needs a
    training that often hides conditions."""
    from models.fourm.presets import default_decoding

    scale = 1.0 if guidance is None else guidance
    return {
        name: replace(
            default_decoding(generator.spec(name, target=True), given),
            guidance=scale, show_opening=False,
        )
        for name in targets
    }  # fmt: skip


def read_input(generator: Generator, name: str, given: str) -> Any:
    """The value of a condition from a file or text, cut to the model's square.

    Raises:
        ValueError: the modality does not exist, or the file cannot be read as one of it.
    """
    spec = generator.spec(name, target=False)
    modality = modalities.get(name)
    if name == "caption":
        path = Path(given) if len(given) < 256 else None
        return path.read_text().strip() if path and path.suffix == ".txt" else given
    try:
        data = given.encode() if given.lstrip().startswith(("{", "[")) else _bytes(given)
        value = modality.decode(data)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{given!r} cannot be read as {name} ({modality.description}): {error}") \
            from None  # fmt: skip
    if modality.kind not in ("image", "map"):
        return value
    return _square(name, value, _side(generator, spec))


def _bytes(path: str) -> bytes:
    file = Path(path)
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"the file is larger than {_MAX_BYTES >> 20} MiB")
    return file.read_bytes()


def _side(generator: Generator, spec: Any) -> int:
    """Side in pixels of the pictures that a modality of the model is made of."""
    if spec.kind == "pixels":
        return spec.grid * spec.patch_size
    return int(spec.name.split("@")[1]) if "@" in spec.name else 224


def _square(name: str, value: np.ndarray, side: int) -> np.ndarray:
    from models.crops import CropPolicy, crop_box

    policy = CropPolicy(num_crops=1, size=side)
    box = crop_box(policy, "", 0, value.shape[1] / value.shape[0])
    return modalities.get(name).crop(value, box, side)


def _write(
    folder: Path, stem: str, name: str, value: Any, picture: np.ndarray | None
) -> list[Path]:
    """Writes a value for people, and where that loses something the value itself too."""
    from PIL import Image

    from models.modalities.det import draw

    if name == "caption":
        return [_put(folder / f"{stem}.txt", (value + "\n").encode())]
    if name == "det":
        raw = _put(folder / f"{stem}.json", json.dumps(value, indent=1).encode())
        canvas = picture if picture is not None else np.full((224, 224, 3), 40, np.uint8)
        shown = draw(value, np.ascontiguousarray(canvas))
    else:
        modality = modalities.get(name)
        shown = modality.render(value)
        raw = folder / f"{stem}.value.{modality.ext}"
        if name != "rgb":
            _put(raw, modality.encode(value))
    image = folder / f"{stem}.png"
    Image.fromarray(shown).save(image)
    return [image] if name == "rgb" else [image, raw]


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
