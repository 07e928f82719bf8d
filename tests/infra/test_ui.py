"""UI helpers show pictures within bounds, and never disturb a run."""

import base64
import io
import logging

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from infra import ui


def picture(height: int, width: int, value: int = 200) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_sheet_holds_every_picture_at_its_place_and_scale():
    sheet = ui.contact_sheet([[picture(8, 8, 10), picture(8, 8, 20)], [picture(8, 8, 30)]], scale=2)
    pixels = np.asarray(sheet)
    step = 16 + ui.GAP
    assert sheet.size == (ui.GAP + 2 * step, ui.GAP + 2 * step)
    for row, column, value in [(0, 0, 10), (0, 1, 20), (1, 0, 30)]:
        top, left = ui.GAP + row * step, ui.GAP + column * step
        assert (pixels[top : top + 16, left : left + 16] == value).all()
    assert (pixels[-16 - ui.GAP :, -16 - ui.GAP :] == 255).all()


def test_titles_take_room_and_are_cut_to_fit():
    rows = [[picture(32, 32)]]
    plain = ui.contact_sheet(rows)
    titled = ui.contact_sheet(rows, ["a very long title indeed"], row_titles=["truth"])
    assert titled.height == plain.height + ui.TITLE_HEIGHT
    assert titled.width == plain.width + ui.ROW_TITLE_WIDTH
    assert np.asarray(titled).min() < 50, "the titles are drawn"


def test_sheet_refuses_what_is_not_a_picture():
    with pytest.raises(ValueError, match="uint8"):
        ui.contact_sheet([[np.zeros((4, 4, 3), np.float32)]])
    with pytest.raises(ValueError, match="at least one"):
        ui.contact_sheet([[]])


def test_data_uri_of_a_noisy_picture_stays_small():
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    uri = ui.data_uri(Image.fromarray(noise))
    assert len(uri) <= ui.MAX_PICTURE_BYTES
    head, body = uri.split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).format == "JPEG"


def test_a_gallery_of_noise_stays_below_300_kb(monkeypatch):
    made = []
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr(
        "prefect.artifacts.create_markdown_artifact", lambda text, key: made.append(text)
    )
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    ui.gallery("noise", [("a title " * 20, noise)] * 12, "A long heading " * 10)
    assert len(made[0]) <= 300_000


def test_outside_a_run_nothing_is_shown(monkeypatch):
    monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", _boom)
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", _boom)
    ui.markdown("key", "text")
    ui.table("key", [{"a": 1}], "title")
    ui.gallery("key", [("a", picture(4, 4))], "title")
    ui.progress("label").update(1, 1)


def test_trouble_with_the_server_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", _boom)
    with caplog.at_level(logging.WARNING):
        ui.markdown("key", "text")
    assert "the run goes on" in caplog.text


def test_artifacts_are_made_inside_a_run(monkeypatch):
    made = []
    monkeypatch.setattr(ui, "in_run", lambda: True)
    for kind in ("create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(
            f"prefect.artifacts.{kind}", lambda *a, kind=kind, **k: made.append((kind, a, k))
        )
    ui.gallery("Label: Depth", [(f"{i}", picture(16, 16)) for i in range(9)], "Depth")
    ui.table("t", [{"a": 1}], "title")
    (_, (text,), keywords), (_, (rows,), _) = made
    assert keywords["key"] == "label-depth"
    assert text.count("data:image/jpeg;base64,") == 1
    assert rows == [{"a": 1}]


def test_progress_is_throttled_but_the_end_is_shown(monkeypatch):
    made = []
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr(
        "prefect.artifacts.create_progress_artifact",
        lambda p, key, description: made.append(("create", p)) or "id",
    )
    monkeypatch.setattr(
        "prefect.artifacts.update_progress_artifact",
        lambda artifact, p, description: made.append(("update", p)),
    )
    display = ui.progress("label:depth")
    for done in range(1, 101):
        display.update(done, 100)
    assert made == [("create", 1.0), ("update", 100.0)]


def _boom(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no server")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
@example("![](http://host/seen.png)")
@example("<img src=http://host/seen.png>&amp;")
@example("1. one\n\n# two | `three` ~~four~~\t- *five*")
def test_a_plain_text_is_one_paragraph_of_that_text_and_no_markup(text):
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"x{ui.plain(text)}")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} == {"text"}
    assert "".join(child.content for child in tokens[1].children) == "x" + " ".join(text.split())
