"""Hostile bytes to clean RGB JPEG: the one place where downloaded pictures are decoded.

Formats are an allow-list, the header's size is checked before a pixel is decoded, and what leaves
here is a plain 8-bit sRGB JPEG without metadata, upright, in the size that the policy asks for.
"""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PROFILE = 4 << 20
"""Largest colour profile that is read, in bytes; those of printers have about one megabyte."""
Resize = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
Filter = Literal["box", "hamming", "bicubic", "lanczos"]


class BadPicture(ValueError):
    """A picture that is dropped; ``reason`` is its class in the status table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class PicturePolicy:
    """What becomes of a downloaded picture. Everything here changes the stored bytes."""

    resize: Resize = "keep_ratio"
    """keep_ratio: shorter side to ``size``; keep_ratio_largest: longer side; border: padded to a
    square; center_crop: cut to a square; no: as it is."""
    size: int = 256
    """Target side in pixels; pictures that are smaller already are never enlarged."""
    filter: Filter = "hamming"
    """How pictures are shrunk: box averages areas, hamming is as sharp as bicubic in half the time
    of lanczos."""
    quality: int = 95
    """JPEG quality of what is stored."""
    min_side: int = 32
    """Shortest side that is kept, in pixels."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded."""
    max_aspect: float = 6.0
    """Largest ratio of the sides."""


@dataclass(frozen=True)
class Picture:
    """A clean picture, and what is known of it."""

    data: bytes
    """The stored JPEG."""
    width: int
    """Of the picture as it came, in pixels, before it was turned upright."""
    height: int
    dhash: int
    """Difference hash of 64 bits: pictures that look alike differ in few of them."""
    sha256: str
    """Hex digest of the stored bytes."""


def clean(data: bytes, policy: PicturePolicy) -> bytes:
    """JPEG bytes of a picture under the policy.

    Raises:
        BadPicture: reason not_image, bomb, truncated, too_small or extreme_aspect.
    """
    return cleaned(data, policy).data


def cleaned(data: bytes, policy: PicturePolicy) -> Picture:
    """A picture under the policy with its original size and its hash.

    Raises:
        BadPicture: see `clean`.
    """
    image = _open(data, policy)
    size = image.size
    try:
        # A JPEG decodes straight at 1/2, 1/4 or 1/8 of its size when that is all we need.
        if policy.resize in ("keep_ratio", "center_crop"):
            image.draft("RGB", (policy.size, policy.size))
        image.load()
        if _is_clean(image, size, policy):
            return _picture(data, size, difference_hash(image))
        ImageOps.exif_transpose(image, in_place=True)
        final = _resized(_to_rgb(image), policy)
        seen = difference_hash(final)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "not_image"
        raise BadPicture(reason, str(error)) from error
    buffer = io.BytesIO()
    final.save(buffer, "JPEG", quality=policy.quality)
    return _picture(buffer.getvalue(), size, seen)


def _picture(data: bytes, size: tuple[int, int], seen: int) -> Picture:
    return Picture(data, *size, seen, hashlib.sha256(data).hexdigest())


def difference_hash(image: Image.Image) -> int:
    """64 bits, one for each cell of an 8 x 8 grid: whether it is darker than its right neighbour.

    Survives scaling, recompression and small changes of colour; not cropping or mirroring.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    # Noise of recompression must not decide between cells that are equal.
    bits = grey[:, 1:] > grey[:, :-1] + 1
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _open(data: bytes, policy: PicturePolicy) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our cap is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPicture("bomb", str(error)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadPicture("not_image", "not a JPEG, PNG, WebP or GIF picture") from error
    width, height = image.size
    if width * height > policy.max_pixels:
        raise BadPicture("bomb", f"{width} x {height} exceeds {policy.max_pixels} pixels")
    if min(width, height) < policy.min_side:
        raise BadPicture("too_small", f"{width} x {height}, shortest side {policy.min_side}")
    if max(width, height) > policy.max_aspect * min(width, height):
        raise BadPicture("extreme_aspect", f"{width} x {height}, limit {policy.max_aspect:g}:1")
    return image


def _is_clean(image: Image.Image, size: tuple[int, int], policy: PicturePolicy) -> bool:
    """Whether the JPEG can be stored untouched: no metadata, no resize, plain RGB.

    Its size is the one before `draft`, which may have shrunk the image to the target already.
    """
    plain = image.format == "JPEG" and image.mode == "RGB" and set(image.info) <= _PLAIN_INFO
    return plain and _target(size, policy) == size


_PLAIN_INFO = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def _to_rgb(image: Image.Image) -> Image.Image:
    """First frame as 8-bit sRGB; transparency over white; 16-bit grey scaled, not clipped."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda v: v / 256).convert("L")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image = _to_srgb(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Colours of a picture with a profile as sRGB has them.

    A profile that is broken, too large, or for other kinds of pictures is not obeyed.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE:
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=16)  # most pictures with a profile have one of a few
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that is nothing to do, or impossible."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGBA" if mode == "RGBA" else "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _target(size: tuple[int, int], policy: PicturePolicy) -> tuple[int, int]:
    """Size of the final picture for an upright picture of (width, height)."""
    width, height = size
    if policy.resize == "no":
        return size
    if policy.resize == "border":
        return (policy.size, policy.size)
    if policy.resize == "center_crop":
        side = min(width, height, policy.size)
        return (side, side)
    side = min(size) if policy.resize == "keep_ratio" else max(size)
    scale = min(1.0, policy.size / side)
    return (max(1, round(width * scale)), max(1, round(height * scale)))


def _resized(image: Image.Image, policy: PicturePolicy) -> Image.Image:
    target = _target(image.size, policy)
    if target == image.size:
        return image
    how = Image.Resampling[policy.filter.upper()]
    if policy.resize == "center_crop":
        return ImageOps.fit(image, target, how)
    if policy.resize == "border":
        image.thumbnail(target, how)
        canvas = Image.new("RGB", target, "white")
        offset = ((target[0] - image.width) // 2, (target[1] - image.height) // 2)
        canvas.paste(image, offset)
        return canvas
    return image.resize(target, how)


# A truncated file must fail, not come out grey below the break.
ImageFile.LOAD_TRUNCATED_IMAGES = False
