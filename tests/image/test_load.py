"""load_image against Pillow itself, and the table of odd pictures in safety.md row by row."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from support.odd_pictures import huge_headers, rle_bmp

from llava_engine.errors import ImageDecodeError, ImageTooLarge
from llava_engine.image import load as load_module
from llava_engine.image.header import read_header
from llava_engine.image.load import check_image, load_image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
LIMITS = {"max_bytes": 1 << 25, "max_pixels": 1 << 26}


def picture(width: int = 37, height: int = 23, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def load(source: object) -> np.ndarray:
    check_image(source)
    return load_image(source, **LIMITS).pixels


def on_white(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[
        :, :, :3
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_source_gives_pillows_pixels(format: str, tmp_path: Path) -> None:
    content = encode(picture(), format)
    path = tmp_path / "picture"
    path.write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    sources = [path, str(path), content, bytearray(content), memoryview(content)]
    loaded = [load_image(source, **LIMITS) for source in sources]
    with path.open("rb") as file:
        loaded.append(load_image(file, **LIMITS))
    with path.open("rb", buffering=0) as raw:
        loaded.append(load_image(raw, **LIMITS))
    for image in loaded:
        assert image.pixels.dtype == np.uint8 and image.pixels.flags.c_contiguous
        np.testing.assert_array_equal(image.pixels, expected)
    assert len({image.content for image in loaded}) == 1
    assert len(loaded[0].content) == 16
    with Image.open(path) as opened:
        np.testing.assert_array_equal(load(opened), expected)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {"progressive": True, "quality": 30}),
        ("JPEG", "RGB", {"comment": b"hello", "icc_profile": bytes(200_000)}),
        ("PNG", "1", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {"bits": 8}),
        ("PNG", "RGB", {"optimize": True, "dpi": (72, 72)}),
        ("WEBP", "RGB", {"lossless": True}),
        ("GIF", "L", {"comment": b"hello"}),
        ("BMP", "1", {}),
        ("BMP", "P", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "P", {}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "RGB", {"compression": "tiff_adobe_deflate", "big_tiff": False}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "YCbCr", {}),
    ],
)
def test_modes_and_variants_equal_pillow(
    format: str, mode: str, options: dict[str, object]
) -> None:
    content = encode(
        (picture(150, 90).quantize(64) if mode == "P" else picture(150, 90, mode)),
        format,
        **options,
    )
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB"))
    np.testing.assert_array_equal(load(content), expected)


@pytest.mark.parametrize(
    "mode",
    sorted({*Image.MODES, "PA", "La", "RGBa", "RGBX", "I;16L", "I;16B", "I;16N"} - {"F"}),
)
def test_pictures_of_every_mode_but_f(mode: str) -> None:
    assert load(Image.new(mode, (9, 7))).shape == (7, 9, 3)
    with pytest.raises(ImageDecodeError, match="floating-point"):
        load(Image.new("F", (9, 7)))


# --- the table of safety.md -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(load(content), np.asarray(expected))
    np.testing.assert_array_equal(load(Image.open(io.BytesIO(content))), np.asarray(expected))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + bytes(20),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x09" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0",
    ],
)
def test_broken_exif_is_no_orientation_and_no_warning(exif: bytes) -> None:
    content = encode(picture(), "JPEG", exif=exif)
    np.testing.assert_array_equal(load(content), load(encode(picture(), "JPEG")))


def test_metadata_bombs_never_reach_pillow() -> None:
    plain = encode(picture(), "PNG")
    text = zlib.compress(bytes(64 << 20), 9)
    chunk = b"zTXta\0\0" + text
    bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = plain[:33] + bomb * 5 + plain[33:]
    tracemalloc.start()
    try:
        pixels = load(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(pixels, load(plain))
    assert peak < 8 << 20


def test_tiff_tags_that_point_at_the_same_bytes_are_not_copied() -> None:
    plain = encode(picture(), "TIFF")
    (offset,) = struct.unpack_from("<I", plain, 4)
    (count,) = struct.unpack_from("<H", plain, offset)
    entries = [plain[offset + 2 + 12 * i :][:12] for i in range(count)]
    # 2,000 private tags of 8 MB each that all lie on the same 8 MB: 16 GB for who believes them
    size = 8 << 20
    entries += [struct.pack("<HHII", 40000 + i, 7, size, len(plain)) for i in range(2000)]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    head = plain[:4] + struct.pack("<I", len(plain) + size) + plain[8:]
    np.testing.assert_array_equal(load(head + bytes(size) + directory), load(plain))


def test_comments_of_a_gif_never_reach_pillow() -> None:
    plain = encode(picture(), "GIF")
    screen = 13 + (3 << (plain[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * 60_000 + b"\0"
    content = plain[:screen] + comment + plain[screen:]
    assert len(read_header(content).data) <= len(plain)  # Pillow's own way is quadratic: minutes
    np.testing.assert_array_equal(load(content), load(plain))


def test_cmyk_jpeg() -> None:
    content = encode(picture(mode="CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(load(content), expected)
    assert abs(load(content).astype(int) - np.asarray(picture())).mean() < 8


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(format: str) -> None:
    grey = np.asarray(picture(mode="L"))
    content = encode(Image.fromarray(grey.astype(np.uint16) * 257), format)
    np.testing.assert_array_equal(load(content), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "int32"])
def test_16_bit_grey_pil_images_are_scaled(dtype: str) -> None:
    wide = np.arange(0, 65536, 7).astype(dtype)[None]
    image = Image.fromarray(wide)
    assert image.mode in ("I;16", "I;16B", "I")
    error = load(image).astype(float) - (wide.astype(float) / 257)[:, :, None]
    assert abs(error).max() < 1


def test_16_bit_grey_with_a_transparent_level() -> None:
    wide = np.full((4, 4), 1000, np.uint16)
    wide[0, 0] = 70
    content = encode(Image.fromarray(wide), "PNG", transparency=1000)
    assert load(content)[1, 1].tolist() == [255] * 3 and load(content)[0, 0].tolist() == [0] * 3


def test_float_arrays_are_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"uint8.*\* 255"):
        check_image(np.zeros((4, 4, 3), np.float32))
    floats = Image.fromarray(np.zeros((4, 4), np.float32))
    for source in (floats, encode(floats, "TIFF")):
        with pytest.raises(ImageDecodeError, match="floating-point"):
            load_image(source, **LIMITS)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(format: str) -> None:
    image = picture(mode="RGBA")
    content = encode(image, format, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(load(content), on_white(Image.open(io.BytesIO(content))))
    assert on_white(image).mean() > np.asarray(image)[:, :, :3].mean()


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBa", "La"])
def test_other_alpha_modes_lie_on_white(mode: str) -> None:
    image = picture(mode="RGBA")
    if mode != "RGBa":
        image = image.convert("LA")
    image = image.convert(mode)
    straight = image.convert("LA") if mode == "La" else image
    np.testing.assert_array_equal(load(image), on_white(straight))


def test_palette_and_colour_key_transparency_lie_on_white() -> None:
    palette = picture(mode="RGB").quantize(16)
    for options in ({"transparency": 3}, {"transparency": bytes(range(0, 256, 16))}):
        content = encode(palette, "PNG", **options)
        expected = on_white(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(load(content), expected)
        assert (expected != np.asarray(palette.convert("RGB"))).any()
    gif = encode(palette, "GIF", transparency=3)
    np.testing.assert_array_equal(load(gif), on_white(Image.open(io.BytesIO(gif))))
    keyed = Image.new("RGB", (4, 4), (10, 20, 30))
    content = encode(keyed, "PNG", transparency=(10, 20, 30))
    assert (load(content) == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(format: str) -> None:
    first, others = picture(), [picture(mode="L").convert("RGB"), Image.new("RGB", (37, 23))]
    lossless = {"lossless": True} if format == "WEBP" else {}
    content = encode(first, format, save_all=True, append_images=others, **lossless)
    loaded = load_image(content, **LIMITS)
    assert loaded.frames == Image.open(io.BytesIO(content)).n_frames == 3
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(loaded.pixels, expected)


def test_a_phones_multi_picture_jpeg_is_its_first_picture() -> None:
    content = encode(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (37, 23))])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(load(content), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(format: str) -> None:
    content = encode(picture(200, 150), format)
    for cut in (len(content) // 2, 40, 20, 12, 3):
        with pytest.raises(ImageDecodeError):
            load(content[:cut])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_pictures_without_pixels() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        check_image(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ImageDecodeError, match="no pixels"):
        load(Image.new("RGB", (0, 5)))
    png = bytearray(encode(picture(), "PNG"))
    png[16:20] = bytes(4)
    with pytest.raises(ImageDecodeError, match="no pixels"):
        load(bytes(png))


@pytest.mark.parametrize("size", [1, 3])
def test_tiny_arrays_are_height_width_channel(size: int) -> None:
    array = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load(array), array)
    np.testing.assert_array_equal(load(encode(Image.fromarray(array), "PNG")), array)
    with pytest.raises(ValueError, match="3 x 1 x 1"):
        check_image(np.zeros((3, 1, 1), np.uint8))
    with pytest.raises(ValueError, match="height x width x 3"):
        check_image(np.zeros((3, 3), np.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_a_huge_header_is_refused_before_decoding(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "_PLUGINS", {})  # `make fuzz` measures the time
    with pytest.raises(ImageTooLarge, match="pixels"):
        load_image(huge_headers()[format], **LIMITS)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("WEBP", "RGB", {"lossless": True}),  # 526 bytes
        ("PNG", "1", {}),
        ("TIFF", "1", {"compression": "group4"}),
    ],
)
def test_few_bytes_may_not_have_many_pixels(
    format: str, mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(Image.new(mode, (4000, 3000)), format, **options)
    monkeypatch.setattr(load_module, "_PLUGINS", {})
    with pytest.raises(ImageTooLarge, match="bytes of data"):
        load_image(content, **LIMITS)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "L", {"progressive": True, "quality": 1}),
        ("JPEG", "RGB", {"quality": 1}),
        ("PNG", "L", {"compress_level": 9}),
        ("PNG", "L", {"compress_level": 9, "bits": 4}),
        ("WEBP", "RGB", {"quality": 0}),
        ("GIF", "L", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_large_pictures_of_one_colour_are_in_proportion(
    format: str, mode: str, options: dict[str, object]
) -> None:
    content = encode(Image.new(mode, (6000, 4000), 200 if mode == "L" else 0), format, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(load(content), expected)


def test_run_length_bmps_whose_pixels_are_in_no_run() -> None:
    # Pillow fills such rows pixel by pixel in Python: 4 s for this one
    with pytest.raises(ImageDecodeError, match="no run"):
        load(rle_bmp(65_000, 1000, b"\1\1\0\0" * 1000 + b"\0\1"))
    runs = (b"\xff\x50" * 8 + b"\0\0") * 2000 + b"\0\1"
    assert (load(rle_bmp(8 * 255, 2000, runs)) == 0x50).all()


def test_tiles_count_as_pixels() -> None:
    content = bytearray(encode(picture(), "TIFF"))
    (offset,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, offset)
    entries = content[offset + 2 :][: 12 * count]
    entries += struct.pack("<HHIIHHII", 322, 4, 1, 1 << 15, 323, 4, 1, 1 << 15)
    content[4:8] = struct.pack("<I", len(content))
    content += struct.pack("<H", count + 2) + entries + bytes(4)
    with pytest.raises(ImageTooLarge, match="tiles"):
        load(bytes(content))


def test_pillows_limit_is_neither_changed_nor_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (2000, 1000))
    contents = [encode(image, format) for format in FORMATS]
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for content in contents:
            assert load(content).shape == (1000, 2000, 3)
            with pytest.raises(ImageTooLarge):
                load_image(content, max_bytes=1 << 25, max_pixels=1_999_999)
        assert before == Image.MAX_IMAGE_PIXELS
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        for content in contents:
            with pytest.raises(ImageTooLarge):
                load(content)
    assert not heard


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\0" * 100, b"GIF89a"])
def test_what_is_no_picture(content: bytes) -> None:
    for source in (content, io.BytesIO(content)):
        with pytest.raises(ImageDecodeError) as caught:
            load(source)
        assert "0x" not in str(caught.value)


# --- sources ----------------------------------------------------------------------------------


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing.png", tmp_path, tmp_path / "fifo", str(tmp_path / "x" / "y")):
        with pytest.raises(ImageDecodeError) as caught:
            load(path)
        assert repr(str(path)) in str(caught.value)
    with pytest.raises(ImageDecodeError) as caught:
        load(tmp_path / "missing.png")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ImageDecodeError):
        load("/dev/zero")


def test_more_bytes_than_allowed(tmp_path: Path) -> None:
    content = encode(picture(), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    exact = {"max_bytes": len(content), "max_pixels": 1 << 26}
    short = {"max_bytes": len(content) - 1, "max_pixels": 1 << 26}
    for make in (lambda: content, lambda: path, lambda: io.BytesIO(content)):
        load_image(make(), **exact)
        with pytest.raises(ImageTooLarge, match="bytes"):
            load_image(make(), **short)


def test_endless_broken_and_text_file_objects() -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return bytes(min(size, 1000))

    class Broken:
        def read(self, size: int) -> bytes:
            raise RuntimeError("no")

    with pytest.raises(ImageTooLarge):
        load_image(Endless(), max_bytes=100_000, max_pixels=1)
    with pytest.raises(ImageDecodeError) as caught:
        load(Broken())
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ImageDecodeError, match="str"):
        load(io.StringIO("text"))


@pytest.mark.parametrize("source", [None, 3, [1], object(), {"a": 1}])
def test_wrong_types_are_refused_at_the_call(source: object) -> None:
    with pytest.raises(TypeError, match="image must be"):
        check_image(source)


def test_urls_empty_paths_and_other_dtypes_are_refused_at_the_call() -> None:
    for url in ("http://example.com/a.png", "HTTPS://example.com"):
        with pytest.raises(ValueError, match="describe_url"):
            check_image(url)
    for path in ("", "a\0b"):
        with pytest.raises(ValueError):
            check_image(path)
    with pytest.raises(TypeError, match="int64"):
        check_image(np.zeros((2, 2, 3), np.int64))


def test_a_broken_pil_image_is_a_decode_error() -> None:
    image = Image.open(io.BytesIO(encode(picture(200, 200), "JPEG")[:900]))
    with pytest.raises(ImageDecodeError) as caught:
        load(image)
    assert isinstance(caught.value.__cause__, OSError)


# --- digests (CVE-2025-46722) -----------------------------------------------------------------


def digest(source: object) -> bytes:
    return load_image(source, **LIMITS).content


def test_equal_bytes_in_another_size_mode_or_palette_differ() -> None:
    raw = bytes(range(24)) * 3
    images: list[object] = [
        Image.frombytes("RGB", (4, 6), raw),
        Image.frombytes("RGB", (6, 4), raw),
        Image.frombytes("L", (12, 6), raw),
        Image.frombytes("P", (12, 6), raw),
        np.frombuffer(raw, np.uint8).reshape(4, 6, 3),
        np.frombuffer(raw, np.uint8).reshape(6, 4, 3),
    ]
    palette = Image.frombytes("P", (12, 6), raw)
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    turned = Image.frombytes("RGB", (4, 6), raw)
    turned.getexif()[0x0112] = 3
    images += [palette, transparent, turned]
    assert len({digest(image) for image in images}) == len(images)
    assert digest(images[0]) == digest(Image.frombytes("RGB", (4, 6), raw))
    assert digest(images[4]) == digest(np.frombuffer(raw, np.uint8).reshape(4, 6, 3))


def test_the_loaded_pixels_are_the_callers_no_longer() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    pixels = load(array)
    array[:] = 9
    assert not pixels.any()
    strided = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)[::2, ::-1]
    np.testing.assert_array_equal(load(strided), strided)
