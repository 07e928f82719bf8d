"""Pictures of a labelled dataset for the UI: what the networks saw, beside what they said."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image

from infra import ui
from infra.shards import TarIndex
from models import modalities
from models.modalities.det import draw
from tasks.chain import Chain
from tasks.tokenizer_data import read_label

logger = logging.getLogger("fourm.flows")
SIDE = 128
"""Side of a picture in the sheet, pixels."""
_AFTER_RGB = ("depth", "normal", "semseg", "clip", "det")


def show(chain: Chain, samples: int = 6) -> None:
    """Show the first samples of the first shard with every label as one contact sheet."""
    known = [name for name in _AFTER_RGB if name in chain.sources]
    others = sorted(chain.sources.keys() - {"rgb", "caption", *known})
    names = ["rgb", *known, *others]
    shard = _first_shard(chain, [*names, "caption"])
    if shard is None or not ui.in_run():
        return
    tars = {name: _open(chain, name, shard) for name in (*names, "caption")}
    keys = tars["rgb"].keys[:samples]
    rows = [[_picture(tars, name, key) for name in names] for key in keys]
    titles = [[str(_value(tars, "caption", key)), *names[1:]] for key in keys]
    sheet = ui.data_uri(ui.contact_sheet(rows, titles=titles))
    captions = "\n".join(f"1. {ui.plain(_value(tars, 'caption', key))}" for key in keys)
    ui.markdown(
        "label-previews", f"## Labels of shard {shard}\n\n![labels]({sheet})\n\n{captions}\n"
    )


class Galleries:
    """A gallery for each label beside its pictures, shown once, as soon as there is a shard."""

    def __init__(self, chain: Chain, samples: int = 6) -> None:
        self._chain, self._samples = chain, samples
        self._left = sorted(chain.sources.keys() - {"rgb", "caption"})

    def update(self) -> None:
        """Show the labels whose first shard has come since the last time."""
        for name in list(self._left) if ui.in_run() else ():
            shard = _first_shard(self._chain, ["rgb", name])
            if shard is not None:
                self._left.remove(name)
                self._show(name, shard)

    def _show(self, name: str, shard: int) -> None:
        tars = {n: _open(self._chain, n, shard) for n in ("rgb", name)}
        pairs = [
            (title, _picture(tars, n, key))
            for key in tars["rgb"].keys[: self._samples]
            for n, title in (("rgb", key), (name, name))
        ]
        ui.gallery(f"gallery-{name}", pairs, f"{name} of shard {shard} beside its pictures")


def _first_shard(chain: Chain, names: list[str]) -> int | None:
    done = [chain.ledger.committed(chain.sources[name]) for name in names]
    return min(set.intersection(*done), default=None)


def _open(chain: Chain, name: str, shard: int) -> TarIndex:
    path, _ = chain.ledger.open_output(chain.sources[name], shard, name)
    return TarIndex(path)


def _value(tars: dict[str, TarIndex], name: str, key: str) -> Any:
    """The decoded value; None for a hole, and for what is in no format of this version."""
    if tars[name].ext(key) != modalities.get(name).ext:
        return None
    try:
        return read_label(name, key, tars[name].read(key))
    except ValueError as error:
        logger.warning("not shown: %s", error)
        return None


def _picture(tars: dict[str, TarIndex], name: str, key: str) -> np.ndarray:
    value = _value(tars, name, key)
    if value is None:
        return np.full((SIDE, SIDE, 3), 255, np.uint8)
    picture = _value(tars, "rgb", key) if name == "det" else None
    if picture is not None:
        rendered = draw(value, picture)
    else:
        rendered = modalities.get(name).render(value)
    return np.asarray(Image.fromarray(rendered).resize((SIDE, SIDE), Image.Resampling.NEAREST))
