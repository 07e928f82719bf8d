"""Hostile bytes to clean RGB JPEG: the one place where downloaded pictures are decoded.

Formats are an allow-list, the header's size is checked before a pixel is decoded, and what leaves
here is a plain 8-bit sRGB JPEG without metadata, upright, in the size that the policy asks for.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, ImageFile

from infra.strict import Endless, Pieces

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PROFILE = 4 << 20
"""Largest colour profile that is read, in bytes; those of printers have about one megabyte."""
MAX_SCANS = 100
"""Most passes over its pixels that a JPEG may ask for; progressive ones have about ten. Each may be
a few bytes long and take as long as all of the others: 350 kB can take a minute, 20 MB an hour."""
MAX_SCANNED = 1_000_000_000
"""Most pixels times passes over them: ten at the largest picture, and some seconds."""
Resize = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""[H, W, 3], sRGB."""


_FAULTS = (
    OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, KeyError, TypeError,
    ArithmeticError, struct.error,
)  # fmt: skip
"""What decoders raise at bytes that they did not expect: the picture's fault, not its shard's."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns a picture upright, by its EXIF orientation."""


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
    untouched = _is_clean(image, policy)
    try:
        pixels = _resized(_pixels(image, data, policy), policy)
        seen = difference_hash(pixels)
        if not untouched:
            data = simplejpeg.encode_jpeg(
                pixels, policy.quality, colorsubsampling="420", fastdct=False
            )
    except _FAULTS as error:
        raise _faulty(error) from error
    return Picture(data, *size, seen, hashlib.sha256(data).hexdigest())


def upright(data: bytes) -> Pixels:
    """The pixels of a picture as it is downloaded, in its own size: what a camera has noted beside
    them - which side is up, what its colours mean - is obeyed.

    Raises:
        BadPicture: reason not_image, bomb or truncated.
    """
    policy = PicturePolicy(resize="no", min_side=1, max_aspect=math.inf)
    image = _open(data, policy)
    try:
        return _pixels(image, data, policy)
    except _FAULTS as error:
        raise _faulty(error) from error


def _faulty(error: Exception) -> BadPicture:
    if isinstance(error, Endless):
        return BadPicture("bomb", str(error))
    reason = "truncated" if "truncated" in str(error).lower() else "not_image"
    return BadPicture(reason, str(error))


def difference_hash(pixels: Pixels) -> int:
    """64 bits, one for each cell of an 8 x 8 grid: whether it is darker than its right neighbour.

    Survives scaling, recompression and small changes of colour; not cropping or mirroring.
    """
    grey = _shrunk(pixels, 9, 8).astype(np.int32) @ _LUMA // 1000
    # Noise of recompression must not decide between cells that are equal.
    bits = grey[:, 1:] > grey[:, :-1] + 1
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


_LUMA = np.array([299, 587, 114], np.int32)  # of ITU-R BT.601, in thousandths


def _open(data: bytes, policy: PicturePolicy) -> Image.Image:
    try:
        image = Image.open(Pieces(data), formats=FORMATS)
    except (Image.DecompressionBombError, Endless) as error:
        raise BadPicture("bomb", str(error)) from error
    except _FAULTS as error:
        raise BadPicture("not_image", "not a JPEG, PNG, WebP or GIF picture") from error
    width, height = image.size
    if width * height > policy.max_pixels:
        raise BadPicture("bomb", f"{width} x {height} exceeds {policy.max_pixels} pixels")
    scans = _scans(data) if image.format == "JPEG" else 0
    if scans > 1 and scans > (most := min(MAX_SCANS, MAX_SCANNED // (width * height))):
        raise BadPicture("bomb", f"{scans} scans of a JPEG of {width} x {height}, limit {most}")
    if min(width, height) < policy.min_side:
        raise BadPicture("too_small", f"{width} x {height}, shortest side {policy.min_side}")
    if max(width, height) > policy.max_aspect * min(width, height):
        raise BadPicture("extreme_aspect", f"{width} x {height}, limit {policy.max_aspect:g}:1")
    return image


def _scans(data: bytes) -> int:
    """Scans of a JPEG: each begins with these two bytes, inside of one a zero follows each 255."""
    each = np.frombuffer(data, np.uint8)  # bytes.count takes six times as long
    return int(np.count_nonzero((each[:-1] == 0xFF) & (each[1:] == 0xDA)))


def _is_clean(image: Image.Image, policy: PicturePolicy) -> bool:
    """Whether the JPEG can be stored untouched: no metadata, no resize, plain RGB."""
    plain = image.format == "JPEG" and image.mode == "RGB" and set(image.info) <= _PLAIN_INFO
    width, height = image.size
    return plain and _target(width, height, policy) == (width, height)


_PLAIN_INFO = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def _pixels(image: Image.Image, data: bytes, policy: PicturePolicy) -> Pixels:
    """The first frame, upright; of a JPEG at a half, a quarter or an eighth of its size where that
    is all we need."""
    factor = _factor(image.size, policy)
    pixels = _jpeg_pixels(image, data, factor)
    if pixels is None:
        image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
    elif not {"exif", "icc_profile"} & set(image.info):
        return pixels
    else:
        decoded = Image.fromarray(pixels)
        decoded.info, image = image.info, decoded
    # Read only: Pillow's own turning writes the EXIF anew, which cameras' odd entries break.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(_to_rgb(image))


def _jpeg_pixels(image: Image.Image, data: bytes, factor: int) -> Pixels | None:
    """What a faster decoder than Pillow's makes of a plain JPEG; None where it sees a fault: how
    bad that is, Pillow says."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    width, height = (-(-side // factor) for side in image.size)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != image.size[::-1]:
            return None  # two readers, two sizes: only one of them was checked
        return simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    except ValueError:
        return None


def _factor(size: tuple[int, int], policy: PicturePolicy) -> int:
    """How many times too large a JPEG is at least, as far as decoders can shrink it."""
    if policy.resize == "no":
        return 1
    outer = policy.resize in ("keep_ratio_largest", "border")
    times = (max(size) if outer else min(size)) // policy.size
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(times, 1))


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


def _target(width: int, height: int, policy: PicturePolicy) -> tuple[int, int]:
    """Width and height of the final picture for an upright picture of these."""
    if policy.resize == "no":
        return width, height
    if policy.resize == "border":
        return policy.size, policy.size
    if policy.resize == "center_crop":
        side = min(width, height, policy.size)
        return side, side
    outer = policy.resize == "keep_ratio_largest"
    return _scaled(width, height, policy.size, max(width, height) if outer else min(width, height))


def _scaled(width: int, height: int, size: int, side: int) -> tuple[int, int]:
    """Width and height at which a side has a size; never larger than before."""
    scale = min(1.0, size / side)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(pixels: Pixels, policy: PicturePolicy) -> Pixels:
    """Pixels at their target size, cut or padded as the policy says."""
    height, width, _ = pixels.shape
    wide, high = _target(width, height, policy)
    if policy.resize == "center_crop":
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    elif policy.resize == "border":
        pixels = _shrunk(pixels, *_scaled(width, height, policy.size, max(width, height)))
        height, width, _ = pixels.shape
        canvas = np.full((high, wide, 3), 255, np.uint8)
        top, left = (high - height) // 2, (wide - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        return canvas
    return _shrunk(pixels, wide, high)


def _shrunk(pixels: Pixels, width: int, height: int) -> Pixels:
    """Pixels at another size, bicubic with antialiasing: what Pillow computes, five times as
    fast."""
    import torch

    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    # In this order torch sees that colours lie side by side, and takes its fast kernel.
    planes = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)
    with torch.inference_mode():
        made = torch.nn.functional.interpolate(
            planes, (height, width), mode="bicubic", antialias=True
        )
    return np.ascontiguousarray(made[0].permute(1, 2, 0).numpy())


# A truncated file must fail, not come out grey below the break.
ImageFile.LOAD_TRUNCATED_IMAGES = False
# Our own cap is stricter.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
