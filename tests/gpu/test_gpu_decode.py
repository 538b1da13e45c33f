"""nvImageCodec's pixels against Pillow's, and that it disturbs nothing: no stream, no capture, no
error of a broken file."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bench.jpeg_decode import photo
from llava_engine.errors import ImageDecodeError, LlavaError
from llava_engine.image.gpu_decode import GpuJpegDecoder, jpeg_decoder, plain_jpeg
from llava_engine.image.header import read_header
from llava_engine.image.load import LoadedImage, load_image
from llava_engine.runtime.graph import CapturedGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
LIMITS = {"max_bytes": 1 << 25, "max_pixels": 1 << 25}
SPIN_CYCLES = 400_000_000  # about a quarter of a second

SIZES = [(1, 1), (17, 9), (337, 223), (640, 480), (1920, 1080)]
KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:2:0 of low quality": {"subsampling": 2, "quality": 30},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "grey": {"mode": "L"},
    "progressive grey": {"mode": "L", "progressive": True},
}
# Levels, (mean, largest): where chroma is interpolated, rounding may go either way twice.
BOUNDS = {"4:4:4": (0.5, 4), "grey": (0.5, 4), "subsampled": (1.5, 48)}


@pytest.fixture(scope="module")
def decoder() -> Iterator[GpuJpegDecoder]:
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec (gpu-decode) is not installed")
    opened = jpeg_decoder("gpu", GPU)
    assert opened is not None
    yield opened
    opened.close()


def encode(
    size: tuple[int, int], *, mode: str = "RGB", quality: int = 90, **options: object
) -> bytes:
    file = io.BytesIO()
    photo(size).convert(mode).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def pillow(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def apart(content: bytes, decoder: GpuJpegDecoder) -> tuple[float, int]:
    """The mean and the largest difference of load_image's pixels from Pillow's, in levels."""
    found = load_image(content, **LIMITS, decode_jpeg=decoder)
    assert found.content != load_image(content, **LIMITS).content, "Pillow decoded it"
    assert found.pixels.flags.c_contiguous
    expected = pillow(content)
    assert found.pixels.shape == expected.shape and found.pixels.dtype == np.uint8
    difference = np.abs(found.pixels.astype(np.int16) - expected)
    return float(difference.mean()), int(difference.max())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_nearly_pillows(
    kind: str,
    size: tuple[int, int],
    decoder: GpuJpegDecoder,
    record_property: Callable[[str, object], None],
) -> None:
    mean, largest = apart(encode(size, **KINDS[kind]), decoder)
    record_property("levels_apart", {"mean": round(mean, 4), "max": largest})
    bounds = BOUNDS[next((name for name in ("4:4:4", "grey") if name in kind), "subsampled")]
    assert mean <= bounds[0] and largest <= bounds[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, decoder: GpuJpegDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode((337, 223), subsampling=0, exif=exif.tobytes())
    mean, largest = apart(content, decoder)
    assert mean <= BOUNDS["4:4:4"][0] and largest <= BOUNDS["4:4:4"][1]


def test_threads_get_what_one_gets(decoder: GpuJpegDecoder) -> None:
    contents = [encode((97 + 40 * i, 401 - 30 * i), subsampling=i % 3) for i in range(8)]

    def decode(content: bytes) -> np.ndarray:
        return load_image(content, **LIMITS, decode_jpeg=decoder).pixels

    alone = [decode(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, contents * 8))
    for index, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[index % 8])


def test_decoding_waits_for_no_other_stream(decoder: GpuJpegDecoder) -> None:
    """The legacy default stream excepted, on which the engine has no work: nvImageCodec's own
    streams wait for it."""
    content = encode((640, 480))
    for _ in range(2):
        load_image(content, **LIMITS, decode_jpeg=decoder)
    stream = torch.cuda.Stream()
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
        done.record()
    loaded = load_image(content, **LIMITS, decode_jpeg=decoder)
    assert not done.query(), "the decoder waited for the device, or the spin was too short"
    done.synchronize()
    again = load_image(content, **LIMITS, decode_jpeg=decoder)
    np.testing.assert_array_equal(loaded.pixels, again.pixels)


def test_a_new_decoder_disturbs_no_capture(decoder: GpuJpegDecoder) -> None:
    content = encode((640, 480))
    expected = load_image(content, **LIMITS, decode_jpeg=decoder).pixels
    number = torch.zeros(1, device=GPU)
    decoded: list[np.ndarray] = []

    def elsewhere() -> None:
        fresh = jpeg_decoder("gpu", GPU)
        decoded.append(load_image(content, **LIMITS, decode_jpeg=fresh).pixels)
        fresh.close()

    def work() -> None:
        number.add_(1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        number.add_(1)

    graphs = CapturedGraphs(torch.cuda.Stream())
    graph = graphs.capture(work)
    for _ in range(3):
        graphs.launch(graph)
    torch.cuda.synchronize()
    assert number.item() == 8  # one run before the capture, three launches of it
    for pixels in decoded:
        np.testing.assert_array_equal(pixels, expected)
    assert len(decoded) == 2
    graphs.clear()


@pytest.mark.parametrize("kind", ["4:2:0", "progressive"])
def test_files_cut_short_are_judged_as_without_it(kind: str, decoder: GpuJpegDecoder) -> None:
    content = encode((337, 223), **KINDS[kind])

    def outcome(cut: int, with_gpu: bool) -> object:
        try:
            chosen = decoder if with_gpu else None
            loaded = load_image(content[:-cut], **LIMITS, decode_jpeg=chosen)
        except LlavaError as error:
            return type(error), str(error)
        return loaded.content, loaded.pixels.tobytes()

    errors = 0
    for cut in (1, 2, 3, 100, len(content) // 2, len(content) - 30):
        expected = outcome(cut, with_gpu=False)
        assert outcome(cut, with_gpu=True) == expected
        errors += expected[0] is ImageDecodeError
    assert errors >= 3


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive", "grey"])
def test_broken_files_break_nothing_else(
    kind: str, decoder: GpuJpegDecoder, record_property: Callable[[str, object], None]
) -> None:
    """Bytes overwritten at random: a picture or an ImageError, and the device goes on."""
    content = encode((337, 223), **KINDS[kind])
    rng = np.random.default_rng(len(kind))
    intact = load_image(content, **LIMITS, decode_jpeg=decoder)
    counts = {"sent": 0, "decoded on the GPU": 0, "Pillow refuses": 0}
    for _ in range(100):
        broken = bytearray(content)
        for at in rng.integers(2, len(content) - 2, rng.integers(1, 8)):
            broken[at] = rng.integers(256)
        broken = bytes(broken)
        try:
            counts["sent"] += plain_jpeg(read_header(broken)) is not None
            found = load_image(broken, **LIMITS, decode_jpeg=decoder)
        except ImageDecodeError:
            continue
        assert isinstance(found, LoadedImage) and found.pixels.shape[2] == 3
        try:
            pillows = load_image(broken, **LIMITS)
        except ImageDecodeError:
            counts["Pillow refuses"] += 1
        else:
            counts["decoded on the GPU"] += found.content != pillows.content
    record_property("counts", counts)
    assert counts["sent"] > 0
    torch.zeros(1, device=GPU).add_(1).item()
    again = load_image(content, **LIMITS, decode_jpeg=decoder)
    assert again.content == intact.content
    np.testing.assert_array_equal(again.pixels, intact.pixels)
