"""What goes to the GPU's JPEG decoder, what comes back of it, and what it changes: nothing else.

The decoder itself is a stand-in here that is Pillow; tests/gpu/test_gpu_decode.py has the real one.
"""

from __future__ import annotations

import importlib
import io
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.pictures import rows_of

import llava_engine
from llava_engine import EngineConfig, PoolConfig, SpawnFailed, WorkerPool
from llava_engine.demo import picture_path
from llava_engine.errors import (
    ImageDecodeError,
    ImageTooLarge,
    KernelsNotBuilt,
    LlavaError,
    UnsupportedModel,
)
from llava_engine.image.gpu_decode import GpuJpegDecoder, Lane, jpeg_decoder, plain_jpeg
from llava_engine.image.header import Header, read_header
from llava_engine.image.load import LoadedImage, load_image
from llava_engine.image.picture_cache import PictureCache
from llava_engine.image.preprocess import ImageProcessorConfig, picture_key, preprocess

LIMITS = {"max_bytes": 1 << 20, "max_pixels": 1 << 20}
CUDA = torch.device("cuda", 0)


def picture(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def pillow_lane() -> Lane:
    return decode


class Recorder:
    """A stand-in that keeps the headers it was given and answers with `answer` of each."""

    def __init__(self, answer: object = None) -> None:
        self.headers: list[Header] = []
        self.answer = answer

    def __call__(self, header: Header) -> np.ndarray | None:
        self.headers.append(header)
        return self.answer(header) if callable(self.answer) else None


def stored_pixels(header: Header) -> np.ndarray:
    """Pillow's pixels, inverted: whoever gets them can tell them from the CPU's."""
    return 255 - decode(header.data)


PLAIN = {
    "4:2:0": encode(picture(), subsampling=2, quality=80),
    "4:2:2": encode(picture(), subsampling=1),
    "4:4:4": encode(picture(), subsampling=0),
    "progressive": encode(picture(), progressive=True),
    "optimised": encode(picture(), optimize=True, quality=20),
    "grey": encode(picture("L")),
    "progressive grey": encode(picture("L"), progressive=True),
    "with metadata": encode(picture(), comment=b"\xff\xd9", icc_profile=bytes(1000), dpi=(9, 9)),
    "Adobe's YCbCr": (
        encode(picture())[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1" + encode(picture())[2:]
    ),
}


def frame_at(content: bytes) -> int:
    """Where the baseline frame header's marker is."""
    return content.index(b"\xff\xc0\0\x11\x08")


def patched(at: int, value: int) -> bytes:
    """The 4:2:0 file with a byte of its frame header changed, `at` counted from the marker."""
    content = bytearray(PLAIN["4:2:0"])
    content[frame_at(content) + at] = value
    return bytes(content)


def doubled_frame() -> bytes:
    content = PLAIN["4:2:0"]
    at = frame_at(content)
    return content[: at + 19] + content[at:]


NOT_PLAIN = {
    "PNG": encode(picture(), "PNG"),
    "WebP": encode(picture(), "WEBP"),
    "CMYK": encode(picture("CMYK")),
    "RGB": encode(picture(), keep_rgb=True),
    "extended sequential": patched(1, 0xC1),
    "arithmetic coding": patched(1, 0xC9),
    "12 bits": patched(4, 12),
    "two components": patched(9, 2),
    "another name of a component": patched(10, 82),
    "4:1:0": patched(11, 0x42),
    "subsampled luma": patched(14, 0x22),
    "two frames": doubled_frame(),
    "restarts": encode(picture(), restart_marker_blocks=2),
    "cut in its scan": PLAIN["4:2:0"][:-200],
    "without its end": PLAIN["4:2:0"][:-2],
    "cut in a later scan": PLAIN["progressive"][:-200],
    "an unknown segment": PLAIN["4:2:0"][:2] + b"\xff\xdc\0\x04\0\1" + PLAIN["4:2:0"][2:],
    "a segment shorter than its length": PLAIN["4:2:0"].replace(b"\xff\xda\0", b"\xff\xda\xff"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_go_to_the_gpu_whole(name: str) -> None:
    content = PLAIN[name]
    sent = plain_jpeg(read_header(content))
    assert sent is not None and sent[-2:] == b"\xff\xd9"
    np.testing.assert_array_equal(decode(sent), decode(content))


def test_what_follows_the_end_marker_stays_behind() -> None:
    content = PLAIN["progressive"]
    header = read_header(content + b"\xff\xd8 a second picture \xff\xd9")
    assert plain_jpeg(header) == plain_jpeg(read_header(content))


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_files_are_pillows(name: str) -> None:
    assert plain_jpeg(read_header(NOT_PLAIN[name])) is None


def test_pictures_above_16_mpixel_are_pillows() -> None:
    content = bytearray(PLAIN["4:2:0"])
    at = frame_at(content) + 5
    content[at : at + 4] = struct.pack(">HH", 4096, 4096)
    assert plain_jpeg(read_header(bytes(content))) is not None
    content[at : at + 4] = struct.pack(">HH", 4096, 4097)
    assert plain_jpeg(read_header(bytes(content))) is None


def test_a_file_of_many_segments_is_pillows() -> None:
    content = PLAIN["4:2:0"]
    at = content.index(b"\xff\xdb")
    table = content[at : content.index(b"\xff\xdb", at + 1)]
    for count, plain in ((400, True), (600, False)):
        padded = content[:at] + table * count + content[at:]
        assert (plain_jpeg(read_header(padded)) is not None) == plain
        np.testing.assert_array_equal(decode(padded), decode(content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(), exif=exif.tobytes())
    decoder = Recorder(stored_pixels)
    loaded = load_image(content, **LIMITS, decode_jpeg=decoder)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(loaded.pixels, 255 - np.asarray(upright))
    assert loaded.pixels.flags.c_contiguous
    (header,) = decoder.headers
    assert header.orientation == orientation
    assert b"Exif" not in header.data, "the decoder could apply the orientation, too"


def test_limits_are_kept_before_the_gpu_sees_anything() -> None:
    content = encode(picture(), subsampling=0)
    decoder = Recorder(stored_pixels)
    for limits in (
        {"max_bytes": len(content) - 1, "max_pixels": 1 << 20},
        {"max_bytes": 1 << 20, "max_pixels": 61 * 45 - 1},
    ):
        with pytest.raises(ImageTooLarge):
            load_image(content, **limits, decode_jpeg=decoder)
    scans = content[content.index(b"\xff\xda") : -2]
    with pytest.raises(ImageDecodeError):
        load_image(content[:-2] + scans * 64 + content[-2:], **LIMITS, decode_jpeg=decoder)
    with pytest.raises(ImageDecodeError):
        load_image(content[:100], **LIMITS, decode_jpeg=decoder)
    assert not decoder.headers
    load_image(content, max_bytes=len(content), max_pixels=61 * 45, decode_jpeg=decoder)
    assert len(decoder.headers) == 1


def test_pillows_own_limit_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 45 - 1)
    decoder = Recorder(stored_pixels)
    with pytest.raises(ImageTooLarge):
        load_image(PLAIN["4:2:0"], **LIMITS, decode_jpeg=decoder)
    assert not decoder.headers


def refusing_lane() -> Lane:
    return lambda jpeg: None


def failing_lane() -> Lane:
    def fail(jpeg: bytes) -> np.ndarray:
        raise RuntimeError("out of memory")

    return fail


def lying_lane() -> Lane:
    return lambda jpeg: np.zeros((45, 60, 3), np.uint8)


def unopened_lane() -> Lane:
    raise RuntimeError("no such device")


@pytest.mark.parametrize("lane", [refusing_lane, failing_lane, lying_lane, unopened_lane])
@pytest.mark.parametrize("name", [*PLAIN, *NOT_PLAIN])
def test_what_the_gpu_refuses_is_as_without_it(
    name: str, lane: object, caplog: pytest.LogCaptureFixture
) -> None:
    content = {**PLAIN, **NOT_PLAIN}[name]

    def outcome(decoder: GpuJpegDecoder | None) -> LoadedImage | tuple[type[LlavaError], str]:
        try:
            return load_image(content, **LIMITS, decode_jpeg=decoder)
        except LlavaError as error:
            return type(error), str(error)

    expected, found = outcome(None), outcome(GpuJpegDecoder(lane))
    if isinstance(expected, LoadedImage):
        assert isinstance(found, LoadedImage)
        assert found.content == expected.content
        np.testing.assert_array_equal(found.pixels, expected.pixels)
    else:
        assert found == expected
    said = [record for record in caplog.records if "decoded on the CPU" in record.message]
    assert bool(said) == (name in PLAIN and lane in (failing_lane, unopened_lane))


def test_a_lane_that_failed_is_not_used_again() -> None:
    opened: list[int] = []

    def open_lane() -> Lane:
        opened.append(len(opened))
        return failing_lane() if len(opened) == 1 else decode

    decoder = GpuJpegDecoder(open_lane)
    header = read_header(PLAIN["4:2:0"])
    assert decoder(header) is None
    for _ in range(3):
        np.testing.assert_array_equal(decoder(header), decode(header.data))
    assert opened == [0, 1]


def test_every_thread_has_a_lane_to_itself() -> None:
    threads, busy, opened = 4, set(), []
    everyone = threading.Barrier(threads, timeout=30)

    def open_lane() -> Lane:
        name = object()
        opened.append(name)

        def lane(jpeg: bytes) -> np.ndarray:
            assert name not in busy
            busy.add(name)
            everyone.wait()  # all decode at once
            busy.discard(name)
            everyone.wait()
            return decode(jpeg)

        return lane

    decoder = GpuJpegDecoder(open_lane)
    header = read_header(PLAIN["4:4:4"])

    def work(_: int) -> None:
        for _ in range(5):
            np.testing.assert_array_equal(decoder(header), decode(header.data))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert len(opened) == threads


def test_closing_lets_go_of_lanes() -> None:
    opened = []

    def open_lane() -> Lane:
        opened.append(None)
        return decode

    decoder = GpuJpegDecoder(open_lane)
    header = read_header(PLAIN["grey"])
    decoder(header)
    decoder(header)
    assert len(opened) == 1
    decoder.close()
    for _ in range(2):  # a thread may be late
        np.testing.assert_array_equal(decoder(header), decode(header.data))
    assert len(opened) == 3


def test_the_two_decoders_share_no_key() -> None:
    processor = ImageProcessorConfig()
    cpu = load_image(PLAIN["4:2:0"], **LIMITS)
    gpu, again = (
        load_image(PLAIN["4:2:0"], **LIMITS, decode_jpeg=GpuJpegDecoder(pillow_lane))
        for _ in range(2)
    )
    other = load_image(PLAIN["4:4:4"], **LIMITS, decode_jpeg=GpuJpegDecoder(pillow_lane))
    assert picture_key(gpu, processor) == picture_key(again, processor)
    assert len({picture_key(image, processor) for image in (cpu, gpu, other)}) == 3
    assert len(gpu.content) == 16


def test_a_picture_cache_uses_the_decoder_it_is_given() -> None:
    processor = ImageProcessorConfig(shortest_edge=28, crop_size=(28, 28))
    decoder = Recorder(stored_pixels)
    room = {"capacity": 1 << 20, "resample": False}
    pictures = PictureCache(processor, **LIMITS, **room, decode_jpeg=decoder)
    plain = PictureCache(processor, **LIMITS, **room)
    content = PLAIN["4:4:4"]
    first, second = pictures.prepare(content), pictures.prepare(content)
    assert first is second and len(decoder.headers) == 1
    assert first.key != plain.prepare(content).key
    inverted = load_image(stored_pixels(read_header(content)), **LIMITS)
    ours = rows_of(first.pixels, 28).view(3, 28, 28)
    np.testing.assert_array_equal(ours, preprocess(inverted, processor))


def test_the_default_is_no_decoder() -> None:
    assert EngineConfig().image_decode == "cpu"
    assert jpeg_decoder("cpu", CUDA) is None
    assert jpeg_decoder("cpu", torch.device("cpu")) is None


def test_the_gpu_decoder_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedModel, match="needs CUDA, and the model is on cpu"):
        jpeg_decoder("gpu", torch.device("cpu"))


def test_without_the_package_one_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cause = ModuleNotFoundError("No module named 'nvidia.nvimgcodec'")

    def missing(name: str) -> None:
        assert name == "nvidia.nvimgcodec"
        raise cause

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(KernelsNotBuilt, match=r"llava-engine\[gpu-decode\]") as raised:
        jpeg_decoder("gpu", CUDA)
    assert raised.value.__cause__ is cause


def test_a_package_that_cannot_decode_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(KernelsNotBuilt, match="cannot decode a JPEG on cuda:0"):
        jpeg_decoder("gpu", CUDA)


def test_a_model_on_the_cpu_is_not_loaded_with_it() -> None:
    pool = WorkerPool(PoolConfig())
    try:
        config = EngineConfig(device="cpu", image_decode="gpu")
        model = llava_engine.get("llava-tiny", config, pool=pool)
        with pytest.raises((SpawnFailed, UnsupportedModel)) as raised:
            model.describe_image(picture_path(), "What is it?").text()
    finally:
        pool.shutdown(0)
    cause = raised.value
    while cause is not None and not isinstance(cause, UnsupportedModel):
        cause = cause.__cause__
    assert "image_decode" in str(cause)
