"""The table of `fourm plan`: a line for every stage that the chosen labelers lead to."""

from __future__ import annotations

from pathlib import Path

from pipelines.params import PlanParams
from pipelines.plan import lines, tokenized


def test_the_plan_holds_tokens_of_every_modality_that_labelers_write() -> None:
    labelers = ["depth", "sam", "dinov2", "metadata", "human_poses", "color_palette", "t5_caption"]
    learned = ["rgb", "depth", "normal", "sam_edge", "dinov2_global"]
    texts = ["caption", "color_palette", "human_poses", "metadata"]
    assert tokenized(labelers, learned) == ["rgb", "depth", "sam_edge", "dinov2_global", *texts]
    coded = tokenized(labelers, [*learned, "sam_instance"])
    assert sorted(coded) == sorted([*tokenized(labelers, learned), "sam_instance"])
    assert tokenized(labelers, learned, ["rgb", "metadata"]) == ["rgb", "metadata"]
    assert tokenized([], ["rgb"]) == ["rgb", "caption"]


def test_a_dataset_that_is_not_planned_yet_is_counted_from_its_list(tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    listed.write_text("".join(f"http://x/{n}.jpg\tcaption {n}\n" for n in range(10)))
    params = PlanParams(
        root=str(tmp_path / "set"), source=str(listed), shard_rows=4, labelers=["det", "metadata"],
        modalities=["rgb"],
    )  # fmt: skip
    found = {line.stage: line for line in lines(params)}
    assert list(found) == [
        "fetch", "label:det", "label:metadata", "tokens:rgb", "tokens:caption", "tokens:det",
        "tokens:metadata",
    ]  # fmt: skip
    assert {line.shards for line in found.values()} == {3}
    assert found["tokens:metadata"].hours < found["tokens:rgb"].hours
