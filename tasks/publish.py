"""Publishing: the token sets and pictures of a dataset as one version that training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from infra.ledger import Stage
from infra.manifest import Manifest, load_manifest, publish
from infra.store import Store
from tasks.chain import Chain
from tasks.plans import WITHDRAWALS
from tasks.tokenize import published_name
from tasks.withdraw import come_back


def publish_tokens(store: Store, name: str, *, val_share: float) -> Manifest:
    """Publish every shard that is tokenized in all modalities; the pictures go along.

    The last shards of the lists that hold samples are the validation split: at least one, where
    there are two. Of a set that has grown those that were held out before stay so, and none that
    was trained on joins them as long as others are enough.

    Args:
        store: the dataset.
        name: of the manifest.
        val_share: share of shards kept from training, 0..1.

    Raises:
        ManifestError: the modalities of a shard do not hold the same keys in the same order.
        ValueError: no shard is tokenized in every modality, or a run that was at work while
            samples were withdrawn has written some of them all the same.
    """
    chain = Chain(store)
    stages = published_stages(chain)
    shards = tokenized_shards(chain, stages)
    before = store.list(WITHDRAWALS)
    _check_gone(store, stages)
    val = _held_out(chain, name, shards, val_share)
    manifest = publish(
        chain.ledger,
        name,
        stages,
        shards,
        splits={"train": sorted(set(shards).difference(val)), "val": val},
        tokenizers={
            **{key: _tokenizer(chain, key) for key in chain.tokenizers},
            **{key: _finer(chain, key) for key in chain.tokens if "@" in key},
            **{name: _vectors(chain, name, shards) for name in chain.embedded},
        },
        meta={"crops": asdict(chain.crops)},
    )
    if store.list(WITHDRAWALS) != before:
        raise ValueError(
            f"samples of {store.url} were withdrawn while {name} v{manifest.version} was published "
            "and may still be named there: run the same `fourm withdraw --apply` once more, then "
            "publish again"
        )
    return manifest


def _check_gone(store: Store, stages: Mapping[str, Stage]) -> None:
    if back := come_back(store, {stage.id for stage in stages.values()}):
        raise ValueError(
            f"{len(back)} samples of {store.url} that were withdrawn are there again, such as "
            f"{back[0]}: a run that was at work meanwhile has written them. Run the same `fourm "
            "withdraw --apply` once more"
        )


def _held_out(chain: Chain, name: str, shards: Sequence[int], share: float) -> list[int]:
    """The shards of the validation split."""
    passes = chain.plan["passes"]
    # Not of the shards that passes over failed rows appended: those are pictures of slow hosts.
    slow = {
        shard
        for again in passes
        if "list" not in again
        for shard in range(again["first_shard"], again["first_shard"] + again["num_shards"])
    }
    of_lists = [shard for shard in shards if shard not in slow] or list(shards)
    before = _splits_before(chain.store, name)
    # What was held out first, then what was not published yet, the last ones first of each.
    order = sorted(of_lists, key=lambda shard: (before.get(shard, 1), -shard))
    # Not those whose rows have all failed, as the few that a list ends with may.
    filled = (shard for shard in order if _samples(chain, shard))
    count = min(len(of_lists) - 1, max(1, round(len(of_lists) * share)))
    return sorted(islice(filled, count))


def _splits_before(store: Store, name: str) -> dict[int, int]:
    """Shard of the version before this one: 0 where it was held out, 2 where it was trained on."""
    try:
        manifest = load_manifest(store, name)
    except FileNotFoundError:
        return {}
    val = set(manifest.splits.get("val", ()))
    return {shard: 0 if shard in val else 2 for shard in manifest.shards()}


def tokenized_shards(chain: Chain, stages: Mapping[str, Stage]) -> list[int]:
    """Shards that all of the stages have committed.

    Raises:
        ValueError: there is none.
    """
    done = [chain.ledger.committed(stage) for stage in set(stages.values())]
    if shards := sorted(set.intersection(*done)):
        return shards
    raise ValueError(
        f"no shard of {chain.store.url} is tokenized in every modality; run `fourm tokenize` first"
    )


def _samples(chain: Chain, shard: int) -> int:
    return chain.ledger.read_commit(chain.fetch, shard).samples


def published_stages(chain: Chain) -> dict[str, Stage]:
    """Modality of the manifest to its stage: the token sets, the pictures for pixel input, and the
    vectors of texts, which models read without tokens."""
    stages = {published_name(stage): stage for stage in chain.tokens.values()}
    return {"rgb": chain.fetch, **chain.embedded, **stages}


def is_current(store: Store, name: str) -> bool:
    """Whether the manifest holds every planned shard of the stages as they are chosen now."""
    try:
        manifest = load_manifest(store, name)
        chain = Chain(store)
        stages = published_stages(chain)
    except (FileNotFoundError, ValueError):
        return False
    known = {modality: entry["fingerprint"] for modality, entry in manifest.modalities.items()}
    wanted = {modality: stage.fingerprint for modality, stage in stages.items()}
    return known == wanted and manifest.shards() == list(chain.shards)


def _vectors(chain: Chain, name: str, shards: Sequence[int]) -> dict[str, Any]:
    """Width and greatest number of the vectors of a modality, as its first label has them."""
    from models.modalities.t5_caption import MAX_TOKENS
    from tasks.tokenizer_data import read_values

    for shard in shards:
        for _, value in read_values(chain.ledger, chain.embedded[name], shard, name):
            if value is not None:
                return {"channels": int(value.shape[1]), "num_tokens": MAX_TOKENS}
    raise ValueError(f"no sample of shards {list(shards)} has a {name}")


def _finer(chain: Chain, key: str) -> dict[str, Any]:
    """The tokenizer of a set of another size, such as rgb@448."""
    name, _, size = key.partition("@")
    count = chain.tokens[key].params.get("tokens") or chain.tokenizers[name].length(int(size))
    return _tokenizer(chain, name) | {"num_tokens": count}


def _tokenizer(chain: Chain, key: str) -> dict[str, Any]:
    info = chain.tokenizers[key]
    names = ("path", "fingerprint", "vocab_size")
    entry = {name: getattr(info, name) for name in names}
    entry["num_tokens"] = info.length(chain.crops.size, chain.kept.get(key, 0))
    return entry | {"ordered": True} if info.ordered else entry
