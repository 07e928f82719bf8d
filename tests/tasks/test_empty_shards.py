"""Contracts of shards whose rows have all failed, as the few that a list ends with may."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import publish
from infra.shards import sample_key, write_tar
from infra.store import Store
from models.fourm.loader import TokenDataset
from models.fourm.masking import Component, Mixture
from models.fourm.spec import ModalitySpec
from pipelines.params import LabelOptions
from tasks.chain import remember
from tasks.publish import publish_tokens
from tasks.train import train_fourm
from tests.tasks.test_token_choices import ROWS, SMALL, _ingested, _tokenize
from tests.tasks.test_train import TINY


@pytest.mark.parametrize("failed", [0, 2])
def test_a_shard_without_a_picture_left_holds_up_nothing(tmp_path, monkeypatch, failed):
    whole = Ledger.commit

    def commit(ledger, stage, shard, data, **options):
        if stage.name == "fetch" and shard == failed:
            statuses = [(key, "not_found", "") for key in data.keys]
            data = ShardData([], dict.fromkeys(data.outputs, write_tar([])), statuses, 1.0)
        return whole(ledger, stage, shard, data, **options)

    monkeypatch.setattr(Ledger, "commit", commit)
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=[]).model_dump())
    _tokenize(store, {"modalities": ["rgb"], "changes": {"rgb": SMALL}})
    manifest = publish_tokens(store, "main", val_share=0.3)
    # What is measured are samples that were held out.
    assert [manifest.samples(shard) for shard in manifest.shards("val")] == [ROWS]
    part = Component(inputs={"rgb": 1.0}, targets={"*": 1.0}, num_inputs=(4, 4),
                     num_targets=(6, 6))
    info = train_fourm(store, manifest, dataclasses.replace(
        TINY, mixture=Mixture(components=(part,))), run="run")
    assert "val/rgb->tok_rgb" in info.metrics
    without = dataclasses.replace(manifest, name="other", splits={
        "train": manifest.shards("train") + manifest.shards("val"), "val": [failed]})
    without.splits["train"].remove(failed)
    info = train_fourm(store, without, dataclasses.replace(
        TINY, mixture=Mixture(components=(part,))), run="without")
    assert not [name for name in info.metrics if name.startswith("val/")]


def test_what_a_set_holds_is_looked_at_where_it_holds_something(tmp_path):
    store, stage = Store(str(tmp_path)), Stage("make:t5_caption", 1, {}, ("t5_caption",))
    for shard, count in ((0, 0), (1, 2)):
        keys = [sample_key(shard, row) for row in range(count)]
        members = []
        for key in keys:
            buffer = io.BytesIO()
            np.save(buffer, np.ones((2, 3), np.float16))
            members.append((f"{key}.npy", buffer.getvalue()))
        data = ShardData(keys, {"t5_caption": write_tar(members)},
                         [(key, "ok", "") for key in keys], 0.1)
        Ledger(store).commit(stage, shard, data)
    manifest = publish(Ledger(store), "set", {"t5_caption": stage}, range(2),
                       splits={"train": [0, 1]})
    manifest = dataclasses.replace(manifest, splits={"train": [0, 1], "val": [0]})
    spec = ModalitySpec(name="t5_caption", kind="seq_emb", max_tokens=4, channels=3,
                        is_target=False)
    found = TokenDataset(store, manifest, "train", [spec]).fixed(0, 2)
    assert found.vectors["t5_caption"][1].tolist() == [2, 2]
    with pytest.raises(ValueError, match="of 3 values, the model takes 5"):
        TokenDataset(store, manifest, "train", [dataclasses.replace(spec, channels=5)])
    with pytest.raises(ValueError, match="set v1 holds no samples in its split 'val' of 1 shards"):
        TokenDataset(store, manifest, "val", [spec])
