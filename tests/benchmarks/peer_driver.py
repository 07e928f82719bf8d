"""Runs the released 4M code on request, in a process of its own with a checkout of it on the path.

    python -P peer_driver.py CHECKOUT THREADS

A line of JSON comes in on standard input, one goes out where standard output was: "prepare" sets
up a work, "run" does it once and says how many seconds that took. This file calls the checkout's
public functions and knows nothing of this project. Packages that the checkout imports and that
are not installed are replaced by empty modules, of which benchmarks need a few functions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OPTIONAL = ("albumentations", "cv2", "matplotlib", "sklearn", "wandb")
SIZE = 224
Work = Callable[..., dict[str, Any]]


class StandIns:
    """Finds modules for packages that are missing."""

    def __init__(self) -> None:
        self.names = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "albumentations":
            module.bbox_crop, module.core = _moved_box, types.SimpleNamespace(  # type: ignore[attr-defined]
                bbox_utils=types.SimpleNamespace(filter_bboxes=_boxes_inside))
        if module.__name__ == "cv2":
            module.pointPolygonTest = _inside  # type: ignore[attr-defined]


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _moved_box(
    box: Any, *, x_min: int, y_min: int, x_max: int, y_max: int, rows: int, cols: int
) -> tuple[float, ...]:
    """A box in shares of a picture, in shares of a window of it."""
    wide, high = x_max - x_min, y_max - y_min
    left, top, right, bottom = box
    return ((left * cols - x_min) / wide, (top * rows - y_min) / high,
            (right * cols - x_min) / wide, (bottom * rows - y_min) / high)


def _boxes_inside(boxes: list[Any], rows: int, cols: int, min_visibility: float) -> list[Any]:
    """The parts of boxes that lie in the window."""
    found = []
    for box in boxes:
        left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in box[:4])
        if right > left and bottom > top:
            found.append((left, top, right, bottom, *box[4:]))
    return found


def _inside(polygon: Any, point: tuple[int, int], measureDist: bool) -> float:
    """1 if a point lies in a polygon, else -1."""
    x, y = point
    odd = False
    corners = polygon.reshape(-1, 2).tolist()
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < (x1 - x0) * (y - y0) / (y1 - y0) + x0:
            odd = not odd
    return 1.0 if odd else -1.0


def _model(at: Path) -> tuple[Any, dict[str, Any]]:
    """The generation model of a checkpoint folder, and its configuration."""
    from fourm.models.fm import FM
    from safetensors.torch import load_file

    config = json.loads((at / "config.json").read_text())
    model = FM(config)
    model.load_state_dict(load_file(at / "model.safetensors"))
    return model.eval(), config


def _nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"caption.tensor": x} as {"caption": {"tensor": x}}."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        modality, key = name.rsplit(".", 1)
        found.setdefault(modality, {})[key] = value
    return found


def train(at: str, model: str, lr: float, clip: float) -> Work:
    """One step of the training script on batches of a folder, with the weights there."""
    import run_training_4m as script
    import torch
    from fourm.data.modality_info import MODALITY_INFO
    from safetensors.torch import load_file

    folder = Path(at)
    config = json.loads((folder / "config.json").read_text())
    domains = sorted({*config["domains_in"], *config["domains_out"]})
    args = argparse.Namespace(
        model=model, in_domains=config["domains_in"], out_domains=config["domains_out"],
        all_domains=domains, input_size=SIZE, patch_size=16, num_register_tokens=0, opt="adamw",
        lr=lr, weight_decay=0.05, opt_eps=1e-8, opt_betas=[0.9, 0.95],
    )
    net = script.get_model(args, {domain: MODALITY_INFO[domain] for domain in domains})
    net.load_state_dict(load_file(folder / "model.safetensors"))

    class Held(torch.nn.Module):
        """What the script expects of its DDP wrapper."""

        def __init__(self) -> None:
            super().__init__()
            self.module, self.autocast = net, False

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                return self.module(*args, **kwargs)

    torch.cuda.synchronize = lambda *_: None  # the script calls it whatever the device
    held, optimizer = Held(), script.create_optimizer(args, net)
    scaler = script.NativeScaler(enabled=False)
    batches = itertools.cycle(_nested(load_file(path)) for path in sorted(folder.glob("batch*")))

    def step(autocast: bool) -> dict[str, Any]:
        held.autocast = autocast
        stats = script.train_one_epoch(
            held, [next(batches)], optimizer, num_input_tokens=128, num_target_tokens=128,
            loss_type="mod", device=torch.device("cpu"), epoch=0, frozen_model_epochs=0,
            loss_scaler=scaler, accum_iter=1, max_norm=clip, start_steps=0, all_domains=domains,
            dtype=torch.float32, loader_len=1,
        )
        return {"loss": stats["[Epoch] loss"]}

    return step


def generate(at: str, given: list[str], plan: dict[str, Any], top_p: float, rows: int) -> Work:
    """One call of the sampler: targets out of random pictures."""
    import torch
    from fourm.data.modality_info import MODALITY_INFO
    from fourm.models.generate import (
        GenerationSampler,
        build_chained_generation_schedules,
        init_empty_target_modality,
        init_full_input_modality,
    )

    model, _ = _model(Path(at))
    sampler, text = GenerationSampler(model), _text_tokenizer()
    schedule = build_chained_generation_schedules(
        cond_domains=given, cfg_grow_conditioning=True, modality_info=MODALITY_INFO, **plan)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        sample: dict[str, Any] = {}
        device = torch.device("cpu")
        for name in given:
            sample[name] = {"tensor": torch.randn(rows, 3, SIZE, SIZE)}
            sample = init_full_input_modality(sample, MODALITY_INFO, name, device)
        for name, count in zip(plan["target_domains"], plan["tokens_per_target"], strict=True):
            sample = init_empty_target_modality(sample, MODALITY_INFO, name, rows, count, device)
        out = sampler.generate(sample, schedule, text_tokenizer=text, top_p=top_p, seed=0)
        return {"tokens": sum(_written(out[name], name, MODALITY_INFO)
                              for name in plan["target_domains"]) / rows}

    return run


def _written(entry: dict[str, Any], name: str, info: dict[str, Any]) -> int:
    """Tokens that a target holds; a sequence is counted to its last one."""
    if info[name]["type"] == "img":
        return entry["tensor"].numel()
    return int((~entry["input_mask"]).sum())


def encode(at: str, rows: int, config: dict[str, Any]) -> Work:
    """One pass of the released ViT over random pictures."""
    import torch
    from fourm.models.fm_vit import FMViT
    from safetensors.torch import load_file

    net = FMViT(config)
    known = net.state_dict()
    tensors = load_file(Path(at) / "model.safetensors")
    net.load_state_dict({name: tensors[name] for name in known})
    pictures = torch.randn(rows, 3, SIZE, SIZE)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        net.eval()(pictures)
        return {}

    return run


def _text_tokenizer() -> Any:
    from tokenizers import Tokenizer

    name = "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    return Tokenizer.from_file(str(Path(sys.path[0]) / name))


def loader(at: str, modalities: list[str], shards: int, batch: int, batches: int) -> Work:
    """Masked batches out of tars, in this process."""
    import torch
    from fourm.data import PreTokenizedImageAugmenter, build_wds_fm_pretraining_dataloader
    from fourm.data.modality_info import MODALITY_INFO, MODALITY_TRANSFORMS

    class NoPixels(PreTokenizedImageAugmenter):
        """Boxes need the size of a picture, which is the same for all here."""

        def __call__(self, mod_dict: Any, crop_settings: Any) -> Any:
            window, flip, _, size, crop = super().__call__(mod_dict, crop_settings)
            return window, flip, (SIZE, SIZE), size, crop

    info = {}
    for name in modalities:
        entry = dict(MODALITY_INFO[name])
        patch = entry.get("patch_size", 16)
        entry["max_tokens"] = entry["max_tokens"] or (SIZE // patch) ** 2
        info[name] = entry | {"input_alphas": [0.5], "target_alphas": [0.5], "keep": ["random"],
                              "path": name}
    folders = ",".join([*modalities, "crop_settings"])
    pipe = build_wds_fm_pretraining_dataloader(
        f"{at}/[{folders}]/shard-{{00000..{shards - 1:05d}}}.tar", modalities, info,
        dict(MODALITY_TRANSFORMS), NoPixels(SIZE, main_domain=None), _text_tokenizer(),
        (128, 128), (128, 128), num_gpus=1, num_workers=1, batch_size=None, epoch_size=None,
        shuffle_buffer_load=256, shuffle_buffer_repeat=256, n_repeats=4,
    )
    samples: Iterator[Any] = iter(pipe)
    collate = torch.utils.data.default_collate

    def run() -> dict[str, Any]:
        for _ in range(batches):
            collate(list(itertools.islice(samples, batch)))
        return {}

    return run


WORKS: dict[str, Callable[..., Work]] = {
    "train": train, "generate": generate, "encode": encode, "loader": loader,
}


def main() -> None:
    """Answers requests until its input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the checkout prints is no answer
    sys.path.insert(0, sys.argv[1])
    missing = StandIns()
    sys.meta_path.append(missing)  # type: ignore[arg-type]
    sample = random.sample  # the checkout gives it dictionary views, which Python 3.11 refuses
    random.sample = lambda items, k: sample(list(items), k)  # type: ignore[assignment, misc]
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    works: dict[str, Work] = {}
    for line in sys.stdin:
        request = json.loads(line)
        found: dict[str, Any] = {"stand_ins": missing.names}
        if request["do"] == "prepare":
            works[request["as"]] = WORKS[request["work"]](**request["settings"])
        else:
            began = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                found |= works[request["as"]](**request["how"])
            found["seconds"] = time.perf_counter() - began
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
