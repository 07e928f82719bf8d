"""What becomes of hostile and odd pictures."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from tasks import pictures
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


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with a further chunk behind its pixels, its checksum right."""
    at = png.index(b"IEND") - 4
    chunk = struct.pack(">I", len(body)) + name + body
    return png[:at] + chunk + struct.pack(">I", zlib.crc32(name + body)) + png[at:]


def of_many_scans(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * times + jpeg[-2:]


def with_pieces(picture: bytes, at: int, piece: bytes, size: int) -> bytes:
    """A picture with so many bytes of empty pieces in it."""
    return picture[:at] + piece * (size // len(piece)) + picture[at:]


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
        (with_chunk(encoded(NOISE, "PNG"), b"iCCP", b""), "not_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_image"),
    ],
    ids=["html", "empty", "bomb", "truncated", "small", "aspect", "format", "chunk", "postscript"],
)
def test_bad_pictures_are_dropped_with_their_reason(data, reason):
    with pytest.raises(BadPicture) as caught:
        clean(data, POLICY)
    assert caught.value.reason == reason


def test_a_jpeg_that_asks_for_its_pixels_to_be_gone_over_without_end_is_a_bomb():
    progressive = encoded(NOISE, "JPEG", progressive=True)
    assert opened(clean(of_many_scans(progressive, 20), POLICY)).size == (85, 64)
    with pytest.raises(BadPicture, match=r"\d+ scans of a JPEG of 120 x 90, limit 100") as caught:
        clean(of_many_scans(progressive, 100), POLICY)
    assert caught.value.reason == "bomb"


def test_a_large_jpeg_may_ask_for_fewer_passes_over_its_pixels(monkeypatch):
    monkeypatch.setattr("tasks.pictures.MAX_SCANNED", 10 * 120 * 90)
    progressive = encoded(NOISE, "JPEG", progressive=True)
    assert opened(clean(progressive, POLICY)).size == (85, 64)
    assert opened(clean(encoded(NOISE, "JPEG"), POLICY)).size == (85, 64)
    with pytest.raises(BadPicture, match="scans of a JPEG of 120 x 90, limit 10"):
        clean(of_many_scans(progressive, 20), POLICY)


@pytest.mark.parametrize(
    ("kind", "at", "piece"),
    [
        ("JPEG", 2, b"\xff\xfe\x00\x02"),
        ("JPEG", 2, b"\xff"),
        ("JPEG", 2, b"\xff\xd0"),
        ("PNG", 33, b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))),
        ("PNG", -12, b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))),
        ("GIF", 13 + 768, b"\x21\xfe\x00"),
    ],
    ids=["jpeg-segments", "jpeg-fill", "jpeg-markers", "png-pixels", "png-behind", "gif"],
)
def test_a_picture_of_pieces_without_end_is_a_bomb_and_one_with_some_is_kept(kind, at, piece):
    picture = encoded(NOISE.convert("P", dither=0) if kind == "GIF" else NOISE, kind)
    some = clean(with_pieces(picture, at, piece, 200 * len(piece)), POLICY)
    assert some == clean(picture, POLICY)
    with pytest.raises(BadPicture, match="pieces of a few bytes") as caught:
        clean(with_pieces(picture, at, piece, 300_000), POLICY)
    assert caught.value.reason == "bomb"


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


@pytest.mark.parametrize("tag", [0x0100, 0x011A], ids=["width", "resolution"])
def test_a_picture_is_turned_upright_though_its_exif_holds_texts_where_numbers_belong(tag):
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", tag, 1, 1, b"ab")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    result = opened(clean(encoded(NOISE, "JPEG", exif=exif), POLICY))
    assert result.size == (64, 85)
    assert np.array_equal(
        np.asarray(result), np.asarray(opened(clean(encoded(NOISE, "JPEG", exif=six()), POLICY)))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(NOISE, "PNG", exif=exif)
    found = np.asarray(opened(clean(data, PicturePolicy(resize="no"))))
    upright = encoded(ImageOps.exif_transpose(opened(data)), "PNG")
    assert np.array_equal(found, np.asarray(opened(clean(upright, PicturePolicy(resize="no")))))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_any_bytes_comes_a_picture_or_a_reason_and_nothing_else(data):
    small = NOISE.resize((24, 16))
    whole = data.draw(
        st.sampled_from([
            encoded(small, "JPEG", exif=six()), encoded(small.convert("P"), "PNG", transparency=1),
            encoded(small, "WEBP", exif=six()), encoded(small.convert("P"), "GIF"),
            encoded(small, "PNG", exif=six()),
        ])
    )  # fmt: skip
    if whole[1:4] == b"PNG" and data.draw(st.booleans()):
        kind = data.draw(st.sampled_from([b"iCCP", b"tRNS", b"pHYs", b"eXIf", b"cHRM", b"acTL"]))
        whole = with_chunk(whole, kind, data.draw(st.binary(max_size=20)))
    else:
        flaw, at = data.draw(st.binary(max_size=8)), data.draw(st.integers(0, len(whole)))
        whole = whole[:at] + flaw + whole[at + data.draw(st.integers(0, 8)) :]
    with suppress(BadPicture):
        assert opened(clean(whole, POLICY)).mode == "RGB"


def six() -> Image.Exif:
    """Turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_clean_jpeg_of_the_right_size_keeps_its_bytes():
    data = encoded(NOISE.resize((64, 64)), "JPEG", quality=90)
    assert clean(data, POLICY) == data


@pytest.mark.parametrize("resize", ["keep_ratio", "center_crop"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_clean_jpeg_of_a_multiple_of_the_size_is_shrunk_too(resize, factor):
    data = encoded(NOISE.resize((64 * factor, 64 * factor)), "JPEG", quality=90)
    assert opened(clean(data, PicturePolicy(size=64, resize=resize))).size == (64, 64)


def smooth(width: int, height: int) -> Image.Image:
    """Noise whose grains are some pixels wide."""
    return NOISE.resize((12, 9)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}],
    ids=["plain", "progressive", "full colour", "restarts"],
)
@pytest.mark.parametrize("turned", [1, 6], ids=["upright", "turned"])
@pytest.mark.parametrize("size", [(120, 90), (300, 200), (601, 403)])
def test_the_fast_decoder_and_pillow_make_the_same_of_a_jpeg(monkeypatch, options, turned, size):
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encoded(smooth(*size), "JPEG", exif=exif, **options)
    fast = np.asarray(opened(clean(data, POLICY)), np.int16)
    monkeypatch.setattr(pictures, "_jpeg_pixels", lambda *_: None)
    slow = np.asarray(opened(clean(data, POLICY)), np.int16)
    assert fast.shape == slow.shape
    assert np.abs(fast - slow).max() <= 4


def test_a_jpeg_with_a_flaw_that_pillow_bears_is_kept():
    data = encoded(smooth(120, 90), "JPEG")
    scan = data.index(b"\xff\xda")
    flawed = data[:scan] + bytes(7) + data[scan:]  # between two segments
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(flawed, "RGB")
    assert opened(clean(flawed, POLICY)).size == (85, 64)


def test_a_jpeg_of_which_readers_see_different_sizes_is_left_to_the_one_that_was_checked(
    monkeypatch,
):
    data = encoded(smooth(120, 90), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda _: (9000, 9000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    assert opened(clean(data, POLICY)).size == (85, 64)


def test_shrinking_averages_what_is_too_fine_to_show():
    fine = (np.indices((192, 256)).sum(0) % 2 * 255).astype(np.uint8)
    grey = np.asarray(opened(clean(encoded(Image.fromarray(fine), "PNG"), POLICY)), np.int16)
    assert grey.shape[:2] == (64, 85)
    assert np.abs(grey[4:-4, 4:-4] - 128).max() < 24


def test_shrunk_pictures_are_as_pillows_bicubic_ones_are():
    image = smooth(300, 211)
    found = np.asarray(opened(clean(encoded(image, "PNG"), POLICY)), np.float32)
    wanted = np.asarray(image.resize((91, 64), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(found - wanted).mean() < 1.5


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


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged, under another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"~XYZ"), (b"gXYZ", b"rXYZ"), (b"~XYZ", b"gXYZ")):
        data = data.replace(old, new, 1)
    return data.replace("sRGB".encode("utf-16-be"), "Odds".encode("utf-16-be"))


def printer_profile() -> bytes:
    """A CMYK profile whose cyan ink is red: paper is white, all that holds black is black."""
    paper, red, black = (255, 128, 128), (138, 208, 195), (0, 128, 128)  # Lab in bytes
    grid = [black if inks & 1 else red if inks & 8 else paper for inks in range(16)]
    ramp = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4
    table += bytes(value for entry in grid for value in entry) + ramp * 3
    head = struct.pack(">I4sI4s4s4s", 128 + 16 + len(table), b"none", 0x02400000, b"prtr", b"CMYK",
                       b"Lab ")  # fmt: skip
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def centre(data: bytes, **policy: object) -> tuple[int, ...]:
    image = opened(clean(data, PicturePolicy(size=64, min_side=8, **policy)))
    assert not set(image.info) & {"icc_profile", "exif"}
    return image.convert("RGB").getpixel((image.width // 2, image.height // 2))


def close(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 12 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("resize", ["no", "keep_ratio"])
def test_colours_of_a_profile_are_stored_as_srgb(mode, resize):
    image = Image.new("RGB", (128, 96), (255, 0, 0)).convert(mode)
    data = encoded(image, "PNG", icc_profile=swapped_profile())
    assert close(centre(data, resize=resize), (0, 255, 0))
    assert close(centre(encoded(image, "PNG"), resize=resize), (255, 0, 0))


def test_cmyk_is_read_as_its_profile_says():
    image = Image.new("CMYK", (128, 96), (255, 0, 0, 0))
    plain, profiled = (
        centre(encoded(image, "JPEG", quality=95, icc_profile=profile))
        for profile in (None, printer_profile())
    )
    assert close(plain, (0, 255, 255))
    assert close(profiled, (255, 0, 0))


def test_a_profile_of_srgb_changes_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert clean(encoded(image, "PNG", icc_profile=profile), POLICY) == clean(
        encoded(image, "PNG"), POLICY
    )


@pytest.mark.parametrize(
    "profile",
    [b"no profile", swapped_profile()[:200], printer_profile(), bytes(5 << 20)],
    ids=["text", "truncated", "of CMYK", "huge"],
)
def test_a_broken_profile_or_one_for_other_pictures_is_not_obeyed(profile):
    image = Image.new("RGB", (128, 96), (255, 0, 0))
    assert close(centre(encoded(image, "JPEG", quality=95, icc_profile=profile)), (255, 0, 0))
