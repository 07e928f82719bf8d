"""Every label is shown beside its pictures, once, as soon as a shard has it."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from infra import ui
from infra.ledger import Ledger, ShardData, Stage
from infra.scenes import render, sample_scene
from infra.shards import hole, sample_key, write_tar
from infra.store import Store
from models import modalities
from pipelines.previews import SIDE, Galleries, show

STAGES = {name: Stage(f"label:{name}", 1, {}, (name,)) for name in ("rgb", "depth", "normal")}


def commit(ledger: Ledger, name: str, shard: int) -> None:
    modality, keys = modalities.get(name), [sample_key(shard, row) for row in range(3)]
    truths = [render(sample_scene(row), 64) for row in range(2)]
    members = [
        (f"{key}.{modality.ext}", modality.encode(getattr(truth, name)))
        for key, truth in zip(keys, truths, strict=False)
    ]
    tar = write_tar([*members, hole(keys[2], "no picture")])
    statuses = [(keys[0], "ok", ""), (keys[1], "ok", ""), (keys[2], "no picture", "")]
    ledger.commit(STAGES[name], shard, ShardData(keys, {name: tar}, statuses, 1.0))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    made: dict[str, str] = {}
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr(
        "prefect.artifacts.create_markdown_artifact", lambda text, key: made.update({key: text})
    )
    return made


def test_labels_are_shown_beside_their_pictures_when_they_come_and_once(tmp_path, shown):
    ledger = Ledger(Store(str(tmp_path)))
    chain: Any = SimpleNamespace(sources=STAGES, ledger=ledger)
    galleries = Galleries(chain)
    commit(ledger, "rgb", 1)
    galleries.update()
    assert shown == {}
    commit(ledger, "depth", 1)
    galleries.update()
    assert shown.keys() == {"gallery-depth"}
    assert len(shown["gallery-depth"]) <= 300_000
    sheet = np.asarray(_picture(shown.pop("gallery-depth")))
    assert sheet.shape[1] == ui.GAP + 6 * (SIDE + ui.GAP), "three pictures, each with its label"
    commit(ledger, "normal", 1)
    galleries.update()
    galleries.update()
    assert shown.keys() == {"gallery-normal"}


def test_a_label_of_another_version_is_left_blank_and_named(tmp_path, shown, caplog):
    ledger = Ledger(Store(str(tmp_path)))
    stages = {**STAGES, "det": Stage("label:det", 1, {}, ("det",))}
    commit(ledger, "rgb", 1)
    keys = [sample_key(1, row) for row in range(3)]
    tar = write_tar([
        (f"{keys[0]}.json", b'{"instances": [{"box": [0, 0, 1, 1], "class_name": "cube"}]}'),
        (f"{keys[1]}.json", b'{"boxes": []}'), (f"{keys[2]}.json", b'{"instances": []}'),
    ])  # fmt: skip
    statuses = [(key, "ok", "") for key in keys]
    ledger.commit(stages["det"], 1, ShardData(keys, {"det": tar}, statuses, 1.0))
    chain: Any = SimpleNamespace(sources=stages, ledger=ledger)
    with caplog.at_level("WARNING", "fourm.flows"):
        Galleries(chain).update()
    assert shown.keys() == {"gallery-det"}
    assert f"not shown: the det of sample {keys[1]} is not in the format" in caplog.text


def test_a_caption_of_the_web_is_shown_as_it_is_and_never_as_markup(tmp_path, shown):
    ledger = Ledger(Store(str(tmp_path)))
    stages = {"rgb": STAGES["rgb"], "caption": Stage("label:caption", 1, {}, ("caption",))}
    commit(ledger, "rgb", 1)
    keys = [sample_key(1, row) for row in range(3)]
    text = "![](http://host/seen.png)\n\n# <img src='http://host/seen.png'>"
    tar = write_tar([(f"{key}.txt", text.encode()) for key in keys])
    statuses = [(key, "ok", "") for key in keys]
    ledger.commit(stages["caption"], 1, ShardData(keys, {"caption": tar}, statuses, 1.0))
    chain: Any = SimpleNamespace(sources=stages, ledger=ledger)
    show(chain)
    page = MarkdownIt().parse(shown["label-previews"])
    drawn = [part for token in page for part in token.children or () if part.type == "image"]
    assert [part.attrs["src"][:16] for part in drawn] == ["data:image/jpeg;"]
    assert [token.tag for token in page if token.type == "heading_open"] == ["h2"]
    assert not any(part.type == "html_inline" for token in page for part in token.children or ())


def _picture(markdown: str) -> Image.Image:
    found = re.search(r"base64,([^)]+)\)", markdown)
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found[1])))
