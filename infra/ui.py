"""What a person sees of a run: progress, tables and pictures as Prefect artifacts.

Outside a Prefect run every function only logs. Trouble with the server is logged and never
fails the run: the store is the record, the UI is a view of it.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from infra.runner import RunProgress

log = logging.getLogger("fourm.ui")
P = ParamSpec("P")

PERIOD_SECONDS = 5.0
"""Least time between two updates of one progress artifact."""
MAX_PICTURE_BYTES = 298_000
"""Most bytes of a data: URI: with its title an artifact stays below 300 kB."""
GAP, TITLE_HEIGHT, ROW_TITLE_WIDTH = 4, 16, 96
"""Layout of contact sheets, in pixels."""
_MARKUP = re.compile(r"[!-/:-@\[-`{-~]")
"""What a backslash before it makes plain: all punctuation of ASCII (CommonMark 2.4)."""


_relay: Callable[[str, dict[str, Any]], None] | None = None


@contextmanager
def relayed(send: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Hand over what this process would show, for a flow's process elsewhere to `replay`.

    Args:
        send: called with a word for `replay` and its arguments, which are JSON values.
    """
    global _relay
    kept, _relay = _relay, send
    try:
        yield
    finally:
        _relay = kept


def replay(what: str, arguments: dict[str, Any]) -> bool:
    """Show here what another process handed to its `relayed`; what is unknown is left out.

    Returns:
        False where the server did not take it: it may be tried again.
    """
    known: dict[str, Callable[..., bool]] = {"table": table, "markdown": markdown}
    return known[what](**arguments) if what in known else True


def in_run() -> bool:
    """Whether somebody sees what is shown: a Prefect run of this thread, or of another process."""
    if _relay is not None:
        return True
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _only_a_view(function: Callable[P, None]) -> Callable[P, bool]:
    """Call the function inside a Prefect run alone, and turn its errors into warnings and False."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            if in_run():
                function(*args, **kwargs)
        except Exception:
            log.warning("%s could not be shown; the run goes on", function.__name__, exc_info=True)
            return False
        return True

    return guarded


class Progress:
    """A progress bar in the UI and a line in the log, at most every `PERIOD_SECONDS`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._artifact: Any = None
        self._last = -math.inf

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show `done` of `total`; the last update is always shown."""
        now = time.monotonic()
        if done < total and now - self._last < PERIOD_SECONDS:
            return
        self._last = now
        if _relay is None:  # the process that shows it also logs it
            log.info("%s: %s", self.name, text or f"{done}/{total}")
        self._show(100.0 * done / total if total else 100.0, text)

    @_only_a_view
    def _show(self, percent: float, text: str) -> None:
        if _relay is not None:
            _relay("progress", {"name": self.name, "percent": percent, "text": text})
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        description = text or self.name
        if self._artifact is None:
            self._artifact = create_progress_artifact(
                percent, key=_key(self.name), description=description
            )
        else:
            update_progress_artifact(self._artifact, percent, description=description)


def progress(name: str) -> Progress:
    """A progress display; `name` becomes the artifact's key."""
    return Progress(name)


def follow(name: str) -> Callable[[RunProgress], None]:
    """An `on_progress` for `runner.run_stages` that feeds a progress display."""
    display = Progress(name)
    return lambda now: display.update(now.done, now.total, now.text)


@_only_a_view
def table(key: str, rows: list[dict[str, Any]], title: str) -> None:
    """Show rows as a table."""
    if _relay is not None:
        _relay("table", {"key": key, "rows": rows, "title": title})
        return
    from prefect.artifacts import create_table_artifact

    create_table_artifact(rows, key=_key(key), description=title)


@_only_a_view
def markdown(key: str, text: str) -> None:
    """Show a text in Markdown."""
    if _relay is not None:
        _relay("markdown", {"key": key, "text": text})
        return
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(text, key=_key(key))


def plain(text: object) -> str:
    """One line of text that Markdown and HTML show as it is.

    Captions come from the web: a picture in one of them would be asked of its server by whoever
    looks at the artifact.
    """
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))


def gallery(
    key: str, images: Sequence[tuple[str, np.ndarray]], title: str, columns: int = 6
) -> None:
    """Show pictures as one contact sheet inside a Markdown artifact.

    Args:
        key: the artifact's key; later pictures under the same key become its versions.
        images: title and uint8 [H, W, 3], of any sizes.
        title: heading of the sheet.
        columns: pictures a row.
    """
    if not images or not in_run():
        return
    columns = min(columns, len(images))
    chunks = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = contact_sheet(
        [[picture for _, picture in chunk] for chunk in chunks],
        titles=[[name for name, _ in chunk] for chunk in chunks],
    )
    markdown(key, f"## {html.escape(title)}\n\n![{html.escape(title)}]({data_uri(sheet)})\n")


def data_uri(image: Image.Image) -> str:
    """A JPEG `data:` URI of at most `MAX_PICTURE_BYTES`: lower quality first, then smaller."""
    from PIL import Image

    quality = 88
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) <= MAX_PICTURE_BYTES:
            return uri
        if quality > 60:
            quality -= 14
        else:
            smaller = (max(1, image.width * 3 // 4), max(1, image.height * 3 // 4))
            image = image.resize(smaller, Image.Resampling.LANCZOS)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] | Sequence[Sequence[str]] = (),
    row_titles: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Lay pictures out in a grid on white.

    Args:
        rows: uint8 [H, W, 3] pictures; rows may differ in length, pictures in size.
        titles: one a column, drawn above the first row; or one list a row, drawn above each.
        row_titles: one a row, drawn at the left.
        scale: whole factor by which pictures are enlarged.

    Raises:
        ValueError: no picture at all, or one that is not uint8 [H, W, 3].
    """
    from PIL import Image, ImageDraw

    tiles = [[_enlarged(picture, scale) for picture in row] for row in rows]
    flat = [tile for row in tiles for tile in row]
    if not flat:
        raise ValueError("a contact sheet needs at least one picture")
    width = max(tile.shape[1] for tile in flat) + GAP
    heights = [max((tile.shape[0] for tile in row), default=0) + GAP for row in tiles]
    per_row = _titles_per_row(titles, len(tiles))
    heads = [TITLE_HEIGHT if names else 0 for names in per_row]
    left = GAP + (ROW_TITLE_WIDTH if row_titles else 0)
    size = (left + width * max(map(len, tiles)), GAP + sum(heights) + sum(heads))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for number, row in enumerate(tiles):
        for column, name in enumerate(per_row[number][: len(row)]):
            text = _fitting(draw, name, width - GAP)
            draw.text((left + column * width, top), text, fill="black")
        top += heads[number]
        if row_titles:
            text = _fitting(draw, row_titles[number], ROW_TITLE_WIDTH - GAP)
            draw.text((GAP, top), text, fill="black")
        for column, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (left + column * width, top))
        top += heights[number]
    return sheet


def _enlarged(picture: np.ndarray, scale: int) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a picture must be uint8 [H, W, 3] and not {picture.dtype} {list(picture.shape)}; "
            "use the modality's render()"
        )
    return np.ascontiguousarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))


def _titles_per_row(titles: Sequence[Any], rows: int) -> list[list[str]]:
    if titles and isinstance(titles[0], str):
        return [list(titles)] + [[] for _ in range(rows - 1)]
    return [list(names) for names in titles] + [[] for _ in range(rows - len(titles))]


def _fitting(draw: Any, text: str, width: int) -> str:
    """The text, its end replaced by an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())[:width]  # a text of megabytes is measured for minutes
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _key(name: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "fourm"
