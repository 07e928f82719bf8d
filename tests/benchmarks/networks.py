"""What the engine adds to bare networks, when it labels and when it tokenizes.

The engine's side is the work of one shard as a worker runs it: reading the tar, decoding,
cropping, the network, encoding and packing. The bare side is the network alone on tensors that are
ready, in the same batches. Both run in turn.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from models.crops import CropPolicy
from models.labelers import load_labeler, preset
from models.labelers.base import stack
from tasks.label import build_work as label_work
from tasks.label import label_stage
from tasks.tokenize import build_work as token_work
from tasks.tokenize import token_stage
from tasks.tokenizer_recipes import tokenizer_recipe
from tasks.train_tokenizers import TokenizerInfo
from tests.benchmarks.data import CROPS, FETCH, PICTURE, empty_store, pictures_shard
from tests.benchmarks.measure import Options, Record, rates
from tokenizers_vq.tokenizer import Tokenizer, fingerprint
from tokenizers_vq.vqvae import VQVAE

LABELER, PICTURES, CROPS_AT_ONCE = "det", 64, 64
FOLDER = "tokenizers/bench"


def label(options: Options) -> list[Record]:
    """Pictures/s of the labelling stage over those of the shipped detector alone."""
    spec = replace(preset("scenes")[LABELER], precision=options.dtype, device="cpu")
    with empty_store() as store:
        images = pictures_shard(store, PICTURES)
        stage = label_stage(spec, FETCH)
        work = label_work(store.url, stage, spec.to_dict())
        labeler = load_labeler(spec)
        batches = [
            labeler.processor(images=list(stack(images[i : i + spec.batch_size])),
                              return_tensors="pt")
            for i in range(0, PICTURES, spec.batch_size)
        ]

        def bare() -> None:
            with labeler.inference():
                for batch in batches:
                    labeler.model(**batch)

        ours, alone = rates([lambda: work.run(0), bare], PICTURES, options.seconds)
    shape = {"labeler": LABELER, "pictures": PICTURES, "batch": spec.batch_size, "size": PICTURE}
    return [Record(name="label", unit="images/s", ours=ours, bare=alone, shape=shape,
                   dtype=options.dtype, threads=options.threads)]


def tokenize(options: Options) -> list[Record]:
    """Crops/s of the tokenizing stage over those of the encoder alone; weights are random."""
    with empty_store() as store:
        images = pictures_shard(store, PICTURES)
        recipe = tokenizer_recipe("rgb")
        packed = np.stack(images * CROPS)
        torch.manual_seed(0)
        net = VQVAE(recipe.resolved(packed))
        tokenizer = Tokenizer("rgb", net, recipe.codec(packed), options.dtype)
        files = tokenizer.files()
        for name, data in files.items():
            store.write(f"{FOLDER}/{name}", data)
        info = TokenizerInfo("rgb", FOLDER, fingerprint(files), tokenizer.vocab_size,
                             tokenizer.num_tokens, {}, 0.0)
        policy = CropPolicy(num_crops=CROPS, size=PICTURE)
        stage = token_stage("rgb", info, policy, FETCH)
        work = token_work(store.url, stage, {"precision": options.dtype, "device": "cpu"})
        parts = tokenizer.codec.to_tensor(packed).split(CROPS_AT_ONCE)

        def bare() -> None:
            enabled = options.dtype == "bf16"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                for part in parts:
                    net.encode(part)

        ours, alone = rates([lambda: work.run(0), bare], len(packed), options.seconds)
    shape = {"modality": "rgb", "pictures": PICTURES, "crops": CROPS, "batch": CROPS_AT_ONCE,
             "size": PICTURE, "tokens": tokenizer.num_tokens}
    return [Record(name="tokenize", unit="crops/s", ours=ours, bare=alone, shape=shape,
                   dtype=options.dtype, threads=options.threads)]
