"""What becomes of hostile and odd pictures."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tasks.pictures import BadPicture, PicturePolicy, clean

POLICY = PicturePolicy(size=64, min_side=8)


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def huge_png_header() -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    pixels = struct.pack(">I", 4) + b"IDAT" + b"0000" + struct.pack(">I", zlib.crc32(b"IDAT0000"))
    return b"\x89PNG\r\n\x1a\n" + chunk + pixels


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>not here</html>", "not_image"),
        (b"", "not_image"),
        (huge_png_header(), "bomb"),
        (encoded(NOISE, "JPEG")[:2000], "truncated"),
        (encoded(NOISE.resize((4, 4)), "PNG"), "too_small"),
        (encoded(NOISE.resize((300, 10)), "PNG"), "extreme_aspect"),
        (encoded(NOISE, "BMP"), "not_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_image"),
    ],
    ids=["html", "empty", "bomb", "truncated", "small", "aspect", "format", "postscript"],
)
def test_bad_pictures_are_dropped_with_their_reason(data, reason):
    with pytest.raises(BadPicture) as caught:
        clean(data, POLICY)
    assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "LA", "1", "I;16"])
def test_every_colour_mode_becomes_plain_rgb_jpeg(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((90, 120), 32768, np.uint16))
    else:
        image = NOISE.convert(mode)
    fmt = "JPEG" if mode == "CMYK" else "PNG"
    result = opened(clean(encoded(image, fmt), POLICY))
    assert (result.format, result.mode, result.size) == ("JPEG", "RGB", (85, 64))
    if mode == "I;16":
        assert abs(np.asarray(result).mean() - 128) < 3


def test_orientation_is_applied_and_metadata_does_not_survive():
    exif = Image.Exif()
    exif[0x0112] = 6
    result = opened(clean(encoded(NOISE, "JPEG", exif=exif), POLICY))
    assert result.size == (64, 85)
    assert not result.getexif()


def test_a_clean_jpeg_of_the_right_size_keeps_its_bytes():
    data = encoded(NOISE.resize((64, 64)), "JPEG", quality=90)
    assert clean(data, POLICY) == data


@pytest.mark.parametrize("resize", ["keep_ratio", "center_crop"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_clean_jpeg_of_a_multiple_of_the_size_is_shrunk_too(resize, factor):
    data = encoded(NOISE.resize((64 * factor, 64 * factor)), "JPEG", quality=90)
    assert opened(clean(data, PicturePolicy(size=64, resize=resize))).size == (64, 64)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_kept(fmt):
    frames = [Image.new("RGB", (90, 120), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(opened(clean(data, POLICY))).mean((0, 1))
    assert red > 240
    assert blue < 15


def test_transparency_is_laid_over_white_and_palettes_keep_their_colours():
    clear = Image.new("RGBA", (90, 120), (255, 0, 0, 0))
    assert np.asarray(opened(clean(encoded(clear, "PNG"), POLICY))).min() > 250
    palette = Image.new("RGB", (90, 120), (10, 200, 30)).quantize(4)
    pixels = np.asarray(opened(clean(encoded(palette, "PNG"), POLICY)), np.float32)
    assert np.abs(pixels - [10, 200, 30]).max() < 6


def test_inverted_cmyk_keeps_its_colours():
    data = encoded(Image.new("RGB", (90, 120), (200, 40, 40)).convert("CMYK"), "JPEG", quality=95)
    red, green, _ = np.asarray(opened(clean(data, POLICY))).mean((0, 1))
    assert red > 180
    assert green < 70


def test_a_text_chunk_that_inflates_without_end_is_refused():
    packed = zlib.compress(bytes(200_000_000), 9)
    body = b"zTXtbomb\0\0" + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = encoded(NOISE, "PNG")
    with pytest.raises(BadPicture):
        clean(data[:33] + chunk + data[33:], POLICY)


@pytest.mark.parametrize(
    ("resize", "size"),
    [("no", (120, 90)), ("keep_ratio", (85, 64)), ("keep_ratio_largest", (64, 48)),
     ("border", (64, 64)), ("center_crop", (64, 64))],
)  # fmt: skip
def test_each_resize_policy_gives_its_size(resize, size):
    policy = PicturePolicy(size=64, resize=resize)
    assert opened(clean(encoded(NOISE, "PNG"), policy)).size == size
