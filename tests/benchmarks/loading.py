"""How fast one core turns shards of tokens into masked batches, beside the released loader."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from infra.machine import keep_freed_memory, peak_rss
from infra.store import Store
from models.fourm.draws import Draws
from models.fourm.loader import TokenDataset
from models.fourm.masking import Component, Mixture, mask_batch
from models.fourm.spec import FourMConfig
from tasks.recipes.released import SEVEN, TWENTY_ONE
from tasks.specs import modality_specs, resolve
from tests.benchmarks.data import released_set
from tests.benchmarks.measure import Call, Options, Record, cases, rounds
from tests.benchmarks.peer import Peer
from tests.benchmarks.peer_shards import write_shard

BATCH, ROWS, TEXT, SLOTS = 256, 512, 256, 128
DENSE = ("rgb", "t5_caption")
SETS = {
    "7": tuple(name for name in SEVEN if name not in DENSE),
    "21": tuple(name for name in TWENTY_ONE if name not in DENSE),
}
"""The modalities of 4M-7 and 4M-21 that are tokens."""
_STEPS, _PEER_STEPS = 4, 1
_EVEN = Component(inputs={"*": 0.5}, targets={"*": 0.5}, num_inputs=(SLOTS, SLOTS),
                  num_targets=(SLOTS, SLOTS))


def loader(options: Options) -> list[Record]:
    """Masked batches of 256 samples from stored tokens of ten crops, on one core.

    `masking` is what masking alone would reach.
    """
    return cases({f"loader.{title}": partial(_loader, options, title, names)
                  for title, names in SETS.items()}, options.only)


def _loader(options: Options, title: str, names: tuple[str, ...]) -> Record:
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory(prefix="fourm-bench-") as folder, ExitStack() as stack:
        store = Store(folder)
        manifest = released_set(store, names, ROWS)
        specs = modality_specs(manifest, max_text=TEXT)
        config = FourMConfig(modalities=specs)
        mixture = resolve(Mixture(components=(_EVEN,)), config)
        data = TokenDataset(store, manifest, "train", specs)
        ready = data.batch_at(0, BATCH)

        def run(fresh: bool) -> None:
            for step in range(_STEPS):
                samples = data.batch_at(step, BATCH) if fresh else ready
                mask_batch(config, samples, mixture, Draws(0, step, BATCH))

        calls: list[Call] = [lambda: run(True), lambda: run(False)]
        peer = stack.enter_context(Peer(options.peer, 1)) if options.peer else None
        if peer:
            write_shard(Path(folder) / "released", specs, ROWS)
            calls.append(peer.prepare("loader", at=f"{folder}/released", shards=1, batch=BATCH,
                                      modalities=[spec.name for spec in specs],
                                      batches=_PEER_STEPS))
        taken = [statistics.median(side) for side in rounds(calls, options.seconds)]
    ours, masking = (round(_STEPS * BATCH / second, 1) for second in taken[:2])
    also = {"tokens_per_second": round(2 * SLOTS * ours, 1), "masking": masking,
            "peak_mb": round(peak_rss() / 1e6)}
    if peer:
        also["peer_peak_mb"] = round(peer.peak / 1e6)
    shape = {"modalities": len(specs), "batch": BATCH, "inputs": SLOTS, "targets": SLOTS,
             "crops": manifest.meta["crops"]["num_crops"],
             "stand_ins": peer.stand_ins if peer else []}
    return Record(name=f"loader.{title}", unit="samples/s/core", ours=ours, shape=shape,
                  peer=round(_PEER_STEPS * BATCH / taken[2], 1) if peer else None,
                  dtype="uint16", threads=1, also=also)
