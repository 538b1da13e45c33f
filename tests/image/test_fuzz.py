"""Mutated pictures: whatever is done to a file, only ImageErrors come out.

LLAVA_FUZZ_EXAMPLES (default 300) sets how many; the mutations come from a fixed seed.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.odd_pictures import rle_bmp

from llava_engine.errors import ImageError
from llava_engine.image.load import load_image

# Not LLAVA_ENGINE_*: those are the package's own settings.
EXAMPLES = int(os.environ.get("LLAVA_FUZZ_EXAMPLES", "300"))


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WIDTH, HEIGHT = 31, 24
# Far more than the seeds have: some just allowed with so few bytes, some refused for them alone.
SIZES = [
    (1024, 1024),
    (1250, 1250),
    (1500, 1500),
    (2048, 2048),
    (2600, 2600),
    (1, 65_535),
    (1000, 65_000),
    (16_000, 4000),
    (65_535, 65_535),
]


def _seeds() -> list[bytes]:
    rng = np.random.default_rng(7)
    rgba = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = [
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgba, "PNG", {"exif": exif}),
        (rgb.quantize(16), "PNG", {"transparency": 2}),
        (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG", {}),
        (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "BMP", {}),
        (grey, "BMP", {}),
        (rgb, "TIFF", {"exif": exif}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (rgb, "TIFF", {"compression": "packbits"}),
        # One colour: here a few bytes make many pixels, whatever the size.
        *((Image.new("RGB", rgb.size, "red"), format, {}) for format in FORMATS),
        (Image.new("RGB", rgb.size, "red"), "JPEG", {"progressive": True}),
        (Image.new("RGB", rgb.size, "red"), "WEBP", {"lossless": True}),
        (Image.new("1", rgb.size), "TIFF", {"compression": "group4"}),
        (Image.new("RGB", rgb.size), "TIFF", {"compression": "tiff_lzw"}),
    ]
    rows = (bytes([WIDTH - 9, 3, 0, 8]) + bytes(range(8)) + b"\0\0") * (HEIGHT - 1)
    contents = [rle_bmp(WIDTH, HEIGHT, rows + b"\0\2\5\0" + b"\7\1\0\1")]
    for image, format, options in variants:
        file = io.BytesIO()
        image.save(file, format, **options)
        contents.append(file.getvalue())
    return contents


SEEDS = _seeds()


def _tiff_sizes(kind: int, width: int, height: int) -> bytes:
    return struct.pack("<HHIIHHII", 256, kind, 1, width, 257, kind, 1, height)


# How headers write a size.
FORMS: list[Callable[[int, int], bytes]] = [
    lambda w, h: struct.pack(">II", w, h),  # PNG
    lambda w, h: struct.pack("<II", w, h),  # BMP
    lambda w, h: struct.pack("<HH", w, h),  # GIF, lossy WebP
    lambda w, h: struct.pack(">HH", h, w),  # JPEG
    lambda w, h: struct.pack("<I", w - 1 & 0x3FFF | (h - 1 & 0x3FFF) << 14),  # lossless WebP
    lambda w, h: (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little"),  # other WebP
    lambda w, h: _tiff_sizes(3, w, h),
    lambda w, h: _tiff_sizes(4, w, h),
    lambda w, h: struct.pack("<HHII", 278, 3, 1, h),  # rows in a TIFF's strip
    lambda w, h: struct.pack("<HHII", 278, 4, 1, h),
]


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The file with another size in its headers: all else is as it was."""
    for form in FORMS:
        content = content.replace(form(WIDTH, HEIGHT), form(width, height))
    return content


def with_checksums(content: bytes) -> bytes:
    """A PNG with the checksums of its chunks made good, so that the decoder goes on."""
    if not content.startswith(b"\x89PNG"):
        return content
    fixed = bytearray(content)
    at = 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    seed = draw(st.sampled_from(SEEDS))
    if draw(st.booleans()):
        seed = with_size(seed, *draw(st.sampled_from(SIZES)))
    content = bytearray(seed)
    for _ in range(draw(st.integers(0, 6))):
        # headers are short and at the front (a TIFF's is at the end), and matter most
        place = st.one_of(st.integers(0, 80), st.integers(-200, -1), st.integers(0, len(content)))
        at = draw(place) % (len(content) + 1)
        kind = draw(st.sampled_from(["bits", "bytes", "insert", "delete", "repeat", "cut"]))
        if kind == "bits" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            new = draw(
                st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff", b"\0\0\0\0"])
            )
            content[at : at + len(new)] = new
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            content[at:at] = content[at : at + 64] * draw(st.integers(1, 20))
        elif kind == "cut" and at > 16:
            del content[at:]
    changed = bytes(content)
    return with_checksums(changed) if draw(st.booleans()) else changed


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(mutated())
def test_only_image_errors_come_out(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in production, where a warning is no error
        try:
            image = load_image(content, max_bytes=1 << 20, max_pixels=1 << 22)
        except ImageError as error:
            assert "0x" not in str(error)
        else:
            height, width, channels = image.pixels.shape
            assert channels == 3 and 0 < height * width <= 1 << 22
            assert image.pixels.dtype == np.uint8 and image.frames >= 1
