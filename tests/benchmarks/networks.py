"""What the engine adds to bare networks, when it labels and when it tokenizes.

The engine's side is a few units as a worker runs them, two at a time: reading and checking the tar,
decoding, cropping, the network with what goes before and after it, encoding, hashing, writing and
committing. The units are smaller than real ones of a thousand pictures, so that what nothing runs
beside, the start of the first and the end of the last, weighs more. The bare side is the network
alone, on the very tensors that the engine hands to it, in the same batches and on as many cores as
torch has threads. Three sides run in turn, and one record holds them all:

    ours, ratio                 the engine has one core more than torch has threads: what keeps the
                                network waiting although there is a core for all else
    ours_shared, ratio_shared   it has the network's cores alone: all that it does is paid with time
                                of the network, as on a machine whose cores all run networks
    bare                        the network

A worker with a GPU, or one whose `num_cpus` are above its threads, is of the first kind. `cpu_ms`,
`cpu_ms_shared` and `cpu_ms_bare` are what each side takes of all cores for a picture or crop.

Two sides never find the machine at one speed: shared ones, and bf16 units above all, change theirs
several times over from second to second. `busy` and `busy_shared` do not depend on it: the share of
the engine's own time in which its network's thread was computing in the network. What is missing
from 1 is what the engine costs; what a ratio is above or below that is the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from infra.ledger import Ledger, commit_path
from infra.machine import cores
from infra.store import Store
from infra.units import StageJob, UnitRunner
from models.crops import CropPolicy
from models.labelers import LabelerSpec, load_labeler, preset
from tasks.label import label_jobs
from tasks.tokenize import token_jobs, token_stage
from tasks.tokenizer_recipes import tokenizer_recipe
from tasks.train_tokenizers import TokenizerInfo
from tests.benchmarks.data import CROPS, FETCH, empty_store, scenes_shards
from tests.benchmarks.measure import Options, Record, cases, rates
from tokenizers_vq.tokenizer import Tokenizer, fingerprint
from tokenizers_vq.vqvae import VQVAE

FOLDER = "tokenizers/bench"
UNITS = 3
MORE = 10
"""Times as long as asked for: the machine's own speed moves by a tenth from second to second."""
TASKS = Path("/proc/self/task")
"""The threads of this process, where the system tells; each may be given cores of its own."""


@dataclass(frozen=True)
class Case:
    """A network and the pictures it is measured on."""

    name: str
    subject: str
    """Kind of the labeler, or whose tokenizer."""
    pictures: int
    """Of a unit."""
    size: int
    """Side of the stored pictures in pixels."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the tokenizer's recipe; of the labeler's processor and network."""


LABEL = (
    Case("label.20", "clip", 32, 256, {"hidden_size": 512, "num_attention_heads": 8}),
    Case("label.200.features", "clip", 256, 128,
         {"hidden_size": 256, "num_attention_heads": 4, "image_size": 128}),
    Case("label.200.det", "det", 256, 128, {"size": 192}),
    Case("label.200.semseg", "semseg", 256, 128, {"size": 224}),
    Case("label.200.normal", "normal", 256, 128, {"size": 144}),
)
"""A ViT with random weights between S/16 and B/16 on pictures of the size that photographs are
stored in. At about 200 scenes/s a smaller one, and the shipped networks for boxes, class maps and
normals, which are shown the scenes larger to be as slow: what differs is how much they write."""

TOKENIZE = (
    Case("tokenize.20", "rgb", 16, 256, {"size": 224, "width": 640, "encoder_depth": 12}),
    Case("tokenize.200", "rgb", 64, 128, {"width": 512, "encoder_depth": 6}),
    Case("tokenize.demo", "rgb", 96, 128),
)
"""An encoder nearly of the released tokenizers' size, a smaller one, and the demo's; weights are
random."""


def label(options: Options) -> list[Record]:
    """Pictures/s of the labelling stage over those of its network alone.

    Raises:
        SystemExit: No core is left for the engine.
    """
    _check_cores(options.threads)
    return cases({case.name: partial(_label, case, options) for case in LABEL}, options.only)


def tokenize(options: Options) -> list[Record]:
    """Crops/s of the tokenizing stage over those of its encoder alone.

    Raises:
        SystemExit: No core is left for the engine.
    """
    _check_cores(options.threads)
    return cases({case.name: partial(_tokenize, case, options) for case in TOKENIZE}, options.only)


def _check_cores(threads: int) -> None:
    if cores() <= threads:
        raise SystemExit(
            f"label and tokenize give the engine a core beside the {threads} of the network "
            f"(--threads), and this process may run on {cores()} in all"
        )


def _label(case: Case, options: Options) -> Record:
    with empty_store() as store, TemporaryDirectory() as folder:
        spec = _spec(case, Path(folder), options.dtype)
        images = scenes_shards(store, UNITS, case.pictures, case.size)
        (job,) = label_jobs([spec], FETCH, range(UNITS))
        labeler = load_labeler(spec)
        network = _network(labeler)
        bare = _replayed(lambda: labeler.label(images), network, labeler.inference)
        with _Watch().on(type(network), "forward") as watch:
            ours, alone, also = _compare(_units(store, job), bare, len(images), options, watch)
    shape = {"labeler": case.subject, "units": UNITS, "pictures": case.pictures,
             "batch": spec.batch_size, "size": case.size}
    return Record(name=case.name, unit="images/s", ours=ours, bare=alone, shape=shape,
                  dtype=options.dtype, threads=options.threads, also=also)


def _spec(case: Case, folder: Path, dtype: str) -> LabelerSpec:
    if case.subject == "clip":
        _random_vit(folder, **case.changes)
        spec = replace(preset("modern")["clip"], model_id=str(folder))
    else:
        spec = preset("scenes")[case.subject]
        if case.changes:
            _enlarged(Path(spec.source), folder, case.changes["size"])
            spec = replace(spec, model_id=str(folder))
    return replace(spec, batch_size=32, precision=dtype, device="cpu")


def _random_vit(folder: Path, hidden_size: int, image_size: int = 224, **changes: int) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    network = CLIPVisionConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=12,
        image_size=image_size, patch_size=16, **changes,
    )  # fmt: skip
    CLIPVisionModel(network).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def _enlarged(source: Path, folder: Path, side: int) -> None:
    """A copy of a network that sees its pictures larger."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "preprocessor_config.json"
    size = {"height": side, "width": side}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))


def _network(labeler: Any) -> torch.nn.Module:
    return getattr(labeler, "tower", labeler).model


def _tokenize(case: Case, options: Options) -> Record:
    with empty_store() as store:
        images = scenes_shards(store, UNITS, case.pictures, case.size)
        recipe = tokenizer_recipe(case.subject, **case.changes)
        packed = np.stack([image[: recipe.size, : recipe.size] for image in images] * CROPS)
        torch.manual_seed(0)
        network = VQVAE(recipe.resolved(packed))
        tokenizer = Tokenizer(case.subject, network, recipe.codec(packed), options.dtype)
        files = tokenizer.files()
        for name, data in files.items():
            store.write(f"{FOLDER}/{name}", data)
        info = TokenizerInfo(case.subject, FOLDER, fingerprint(files), tokenizer.vocab_size,
                             tokenizer.num_tokens, {}, 0.0)
        policy = CropPolicy(num_crops=CROPS, size=recipe.size)
        stage = token_stage(case.subject, info, policy, FETCH)
        (job,) = token_jobs([stage], range(UNITS), precision=options.dtype, device="cpu")
        parts = tokenizer.codec.to_tensor(packed).split(tokenizer.batches.size)

        def bare() -> None:
            enabled = options.dtype == "bf16"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                for part in parts:
                    network.encode(part)

        with _Watch().on(VQVAE, "encode") as watch:
            ours, alone, also = _compare(_units(store, job), bare, len(packed), options, watch)
    shape = {"modality": case.subject, "units": UNITS, "pictures": case.pictures, "crops": CROPS,
             "batch": tokenizer.batches.size, "size": recipe.size, "width": recipe.width,
             "depth": recipe.encoder_depth, "tokens": tokenizer.num_tokens}
    return Record(name=case.name, unit="crops/s", ours=ours, bare=alone, shape=shape,
                  dtype=options.dtype, threads=options.threads, also=also)


def _units(store: Store, job: StageJob) -> Callable[[], None]:
    """Runs all shards of a job to their commits, each time as if they had never been."""
    runner, ledger = UnitRunner(store, [job], torch.get_num_threads()), Ledger(store)

    def unit(shard: int) -> None:
        store.delete(commit_path(job.stage.id, shard))
        ledger.release(job.stage, shard)
        (status,) = runner.run(shard, "[[0, 0]]")
        assert status.state == "committed", status.reason

    def run() -> None:
        with ThreadPoolExecutor(job.at_once) as pool:
            list(pool.map(unit, job.shards))

    return run


class _Watch:
    """Seconds of CPU that threads spent in a network, as far as they called it themselves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, kind: type, name: str) -> Iterator[_Watch]:
        """Watches a method of a class of networks during the block."""
        method = getattr(kind, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*args, **keywords)
            finally:
                self.seconds += time.thread_time() - began

        with patch.object(kind, name, watched):
            yield self


def _compare(
    ours: Callable[[], None], bare: Callable[[], None], units: int, options: Options, watch: _Watch
) -> tuple[float, float, dict[str, float]]:
    """Units/s of the engine beside the network and of the network, and the figures of `also`."""
    threads, found = options.threads, dict[str, list[float]]()

    def timed(call: Callable[[], None], side: str, number: int) -> Callable[[], None]:
        def run() -> None:
            with _on_cores(number):
                busy, cpu, wall = watch.seconds, time.process_time(), time.perf_counter()
                call()
                wall = time.perf_counter() - wall
                figures = {"cpu_ms": (time.process_time() - cpu) / units * 1e3,
                           "busy": (watch.seconds - busy) / wall}
            for name, figure in figures.items():
                found.setdefault(name + side, []).append(figure)

        return run

    calls = [timed(ours, "", threads + 1), timed(bare, "_bare", threads)]
    if TASKS.is_dir():
        calls.append(timed(ours, "_shared", threads))
    fast, alone, *shared = rates(calls, units, MORE * options.seconds)
    also = {name: round(statistics.median(each[1:]), 3) for name, each in found.items()}
    for rate in shared:
        also |= {"ours_shared": rate, "ratio_shared": round(rate / alone, 3)}
    return fast, alone, also


def _replayed(
    run: Callable[[], Any], network: torch.nn.Module, inference: Callable[[], Any]
) -> Callable[[], None]:
    """Calls the network once more with everything that a run gives to it."""
    calls: list[tuple[Any, Any]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, keywords: calls.append((args, keywords)), with_kwargs=True
    )
    run()
    hook.remove()

    def bare() -> None:
        with inference():
            for args, keywords in calls:
                network(*args, **keywords)

    return bare


@contextmanager
def _on_cores(number: int) -> Iterator[None]:
    """All threads, and those that they start, on the first few cores only; where the system can."""
    allowed = os.sched_getaffinity(0) if TASKS.is_dir() else set[int]()
    _place(sorted(allowed)[:number])
    try:
        yield
    finally:
        _place(sorted(allowed))


def _place(chosen: list[int]) -> None:
    for task in TASKS.iterdir() if chosen else ():
        with suppress(ProcessLookupError):  # a thread that has ended since
            os.sched_setaffinity(int(task.name), chosen)
