"""Mutated pictures: whatever is done to a file, only ImageErrors come out.

LLAVA_FUZZ_EXAMPLES (default 300) sets how many; the mutations come from a fixed seed.
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_engine.errors import ImageError
from llava_engine.image.load import load_image

# Not LLAVA_ENGINE_*: those are the package's own settings.
EXAMPLES = int(os.environ.get("LLAVA_FUZZ_EXAMPLES", "300"))


def _seeds() -> list[bytes]:
    rng = np.random.default_rng(7)
    rgba = Image.fromarray(rng.integers(0, 256, (24, 31, 4), dtype=np.uint8))
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
    ]
    contents = []
    for image, format, options in variants:
        file = io.BytesIO()
        image.save(file, format, **options)
        contents.append(file.getvalue())
    return contents


SEEDS = _seeds()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
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
    return bytes(content)


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
