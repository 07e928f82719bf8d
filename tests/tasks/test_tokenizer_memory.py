"""What tokenizers learn from is bounded, however much a dataset or a picture holds."""

from __future__ import annotations

import numpy as np
import pytest

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities
from models.modalities.sam_instance import instance
from tasks.tokenizer_config import TokenizerRecipe
from tasks.tokenizer_data import _stacked, load_crops
from tokenizers_vq.codec import feature_statistics

MASKS = 30


@pytest.mark.parametrize("shards", [1, 3])
def test_hundreds_of_masks_a_picture_are_no_more_values_than_the_recipe_allows(tmp_path, shards):
    store, stage = Store(str(tmp_path)), Stage("label:sam", 1, {}, ("sam_instance",))
    mask = instance(np.ones((4, 4), bool), 0.9)
    label = modalities.get("sam_instance").encode({"size": [8, 8], "instances": [mask] * MASKS})
    for shard in range(shards):
        keys = [sample_key(shard, row) for row in range(8)]
        tar = write_tar((f"{key}.json", label) for key in keys)
        statuses = [(key, "ok", "") for key in keys]
        Ledger(store).commit(stage, shard, ShardData(keys, {"sam_instance": tar}, statuses, 1.0))
    recipe = TokenizerRecipe(kind="mask", size=64, max_samples=20)
    train, held_out = load_crops(
        store, "sam_instance", stage, recipe, list(range(shards)), held_out=5
    )
    assert train.shape == ((18 if shards == 1 else 20), 64, 64)
    assert len(held_out) == (2 if shards == 1 else 5)


def test_values_are_stacked_in_order_and_those_of_another_shape_refused():
    values = np.arange(1000, dtype=np.uint8).reshape(500, 2)
    assert np.array_equal(_stacked(iter(values)), values)
    assert len(_stacked(iter([]))) == 0
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(1,\)"):
        _stacked(iter([np.zeros(2), np.zeros(1)]))


def test_statistics_of_many_cells_are_exact_where_single_precision_is_not():
    """100,000 maps of CLIP are as many cells: summed up in float32 their mean was 6 % off."""
    maps = np.full((20, 1024, 1024, 2), 0.3, np.float16)
    mean, std = feature_statistics(maps)
    assert mean == pytest.approx([float(np.float16(0.3))] * 2, rel=1e-6)
    assert std == pytest.approx([1e-4] * 2)
