"""What a modality is, and the image helpers that several of them share.

A modality owns its file format, its geometry under cropping and its picture for contact sheets.
How it is labelled and tokenized refers to it by name. Values are plain numpy arrays or JSON-like
objects, so that this module needs no torch.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from infra.strict import Pieces
from models.crops import CropBox
from tokenizers_vq.sequences.form import TextForm

Kind = Literal["image", "map", "feature", "vector", "sequence"]
MAX_PIXELS = 64_000_000
"""Largest stored picture that a codec opens: even our own shards may have been tampered with."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One view of an image: how it is stored, cropped and shown."""

    name: str
    """Name in stages, manifests and on the command line."""
    kind: Kind
    """image: colours; map: one value or vector a pixel; feature: a coarse grid; vector: one for the
    whole image; sequence: text, what is written as text, or vectors of a text."""
    ext: str
    """Extension of its member in a shard, without a dot."""
    encode: Callable[[Any], bytes]
    """Value to the bytes of a member."""
    decode: Callable[[bytes], Any]
    """The inverse of ``encode``, up to the format's quantisation."""
    crop: Callable[[Any, CropBox, int], Any]
    """(value, window, side in pixels) to the value of that window."""
    render: Callable[[Any], np.ndarray]
    """Value to a uint8 picture [H, W, 3] for contact sheets."""
    description: str = ""
    """One line: shape, unit and value range."""
    labeler: str = ""
    """ "module:Class" of the labeler that writes it, where no kind of this package's registry
    does; a subclass of `models.labelers.Labeler`."""
    model_id: str = ""
    """Network of that labeler, a hub id or a folder; empty where it computes without one."""
    text: TextForm | None = None
    """How its values are written as text; None where they are not."""
    tokenizer: Mapping[str, Any] | None = None
    """Fields of the recipe of its learned tokenizer (`tasks.tokenizer_config.TokenizerRecipe`),
    at least "kind"; None where it has none, or one of the project's own recipes."""


def open_image(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Decodes a picture of an allowed format and bounded size.

    Raises:
        ValueError: it is none, it is damaged or cut short, or it is too large.
    """
    try:
        image = Image.open(Pieces(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"picture of {size} exceeds {MAX_PIXELS} pixels")
        image.load()
    except UnidentifiedImageError:  # which names the place in memory, another in each run
        raise ValueError(f"no picture of the format {' or '.join(formats)}") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged picture Pillow raises any kind
        raise ValueError(str(error) or type(error).__name__) from None
    return image


def open_map(data: bytes, *modes: str) -> Image.Image:
    """Decodes a PNG of one of Pillow's modes: read as another, its numbers would mean nothing.

    Raises:
        ValueError: as of a map of 8 bits where 16 are stored, or of colours where classes are.
    """
    image = open_image(data, ("PNG",))
    if image.mode not in modes:
        raise ValueError(f"a PNG of mode {image.mode}, not {modes[0]}")
    return image


def numbers(array: np.ndarray) -> np.ndarray:
    """The array itself, where all of it are finite numbers.

    Raises:
        ValueError: as of a network whose activations have overflowed. Cast to pixels or to tokens
            such values would pass for labels.
    """
    if not np.isfinite(array).all():
        raise ValueError("a value is not a finite number")
    return array


def to_json(value: Any) -> bytes:
    """JSON-like objects as bytes, equal for equal objects."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def png(array: np.ndarray) -> bytes:
    """uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W] as PNG bytes.

    Run lengths and Huffman codes alone take half the time of a search for repeats, and what PNG's
    filters leave of smooth maps comes out as small.
    """
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def crop_image(
    image: Image.Image, box: CropBox, size: int, resample: Image.Resampling
) -> Image.Image:
    """The window of a PIL image, resized to size x size and flipped when the box says so."""
    window = box.pixels(image.height, image.width)
    if window == (0, 0, size, size) == (0, 0, image.width, image.height):
        out = image
    else:
        out = image.resize((size, size), resample, box=window)
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.hflip else out


def crop_float(array: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    """Bilinear window of float32 [H, W], antialiased when it shrinks."""
    image = Image.fromarray(np.ascontiguousarray(array, dtype=np.float32))
    return np.asarray(crop_image(image, box, size, Image.Resampling.BILINEAR), np.float32)
