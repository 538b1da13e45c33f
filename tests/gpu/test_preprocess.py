"""Pictures prepared on the GPU against the CPU path, bit for bit, from the kernels to the text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU
from support.pictures import odd_pictures, random_image, random_images, rows_of
from support.uploads import uploaded_arrays

import llava_engine
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.errors import KernelsNotBuilt
from llava_engine.image.load import LoadedImage
from llava_engine.image.picture_cache import PictureCache
from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture
from llava_engine.image.preprocess import preprocess as preprocess_on_the_cpu
from llava_engine.kernels.library import references
from llava_engine.kernels.preprocess import COLUMNS, ROWS, DecodedPicture, Pass, preprocess
from llava_engine.network.clip import patch_rows
from llava_engine.network.weights import load_model
from llava_engine.pool import backend
from llava_engine.runtime import streams as streams_module
from llava_engine.runtime.picture_encoder import PictureEncoder
from llava_engine.runtime.streams import DeviceStreams

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LLAVA = ImageProcessorConfig(shortest_edge=336, crop_size=(336, 336))


@pytest.fixture
def generator() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy  # fresh pictures every time
    print("seed", seed)
    return np.random.default_rng(seed)


def check(
    image: LoadedImage, processor: ImageProcessorConfig, patch: int, dtype: torch.dtype
) -> int:
    """The kernels' rows are the CPU path's; returns the number of passes they took."""
    decoded = decoded_picture(image, processor, resample=False)
    ours = rows_of(decoded, patch, dtype=dtype, device="cuda")
    pixels = torch.from_numpy(preprocess_on_the_cpu(image, processor))[None]
    expected = patch_rows(pixels, patch)[0].to(dtype)
    assert torch.equal(ours.cpu(), expected), (image.pixels.shape, processor, patch)
    return len(decoded.passes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_300_random_pictures(dtype: torch.dtype, generator: np.random.Generator) -> None:
    passes = [check(*chosen, dtype) for chosen in random_images(generator, 300)]
    assert passes.count(2) > 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_odd_pictures(padded: bool, dtype: torch.dtype) -> None:
    processor = ImageProcessorConfig(shortest_edge=56, crop_size=(56, 56), do_pad=padded)
    for image in odd_pictures().values():
        check(image, processor, 14, dtype)


@pytest.mark.parametrize(
    "size", [(336, 336), (1080, 1920), (1920, 1080), (2400, 1080), (3000, 4000)], ids=str
)
def test_large_pictures(size: tuple[int, int], generator: np.random.Generator) -> None:
    check(random_image(generator, *size), LLAVA, 14, torch.float16)


@pytest.mark.parametrize("axes", [(ROWS,), (COLUMNS,), (ROWS, COLUMNS), (COLUMNS, ROWS)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 86), (37, 300), (400, 257)], ids=str)
def test_any_weights_and_nothing_beyond_the_rows(
    size: tuple[int, int], axes: tuple[int, ...], generator: np.random.Generator
) -> None:
    """Random weights, so large that sums are clipped at both ends."""
    shape, passes = list(size), []
    for axis in axes:
        length, count = size[axis], 5 if size[axis] >= 5 else 1
        shape[axis] = outputs = 2 * length + 1
        taps = generator.integers(-(1 << 22), 1 << 22, (4 + count, outputs), dtype=np.int32)
        taps[0] = generator.integers(0, length - count + 1, outputs)
        passes.append(Pass(axis, taps))
    picture = DecodedPicture(
        generator.integers(0, 256, (*size, 3), dtype=np.uint8),
        tuple(passes),
        (shape[0] + 9, shape[1] + 4),
        (5, 1),
        generator.standard_normal((256, 3)).astype(np.float32),
        0,
    )
    uploaded, places = DeviceStreams(GPU).upload(picture.arrays)
    patches = (picture.size[0] // 3) * (picture.size[1] // 3)
    held = torch.full((2 + patches, 32), torch.nan, device=GPU)
    preprocess(held[1:-1], picture, uploaded, places, 3)
    plain = torch.full_like(held, torch.nan)
    with references():
        preprocess(plain[1:-1], picture, uploaded, places, 3)
    assert torch.equal(held[1:-1], plain[1:-1])
    assert held[0].isnan().all() and held[-1].isnan().all()


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    uploaded = torch.zeros(3400, dtype=torch.uint8, device=GPU)
    out = torch.zeros(6, 16, device=GPU)
    right: list[Any] = [out, uploaded, [0, 5, 7], 108, [ROWS, 3180, 5, 5], 2, [5, 7, 0, 0]]
    op = torch.ops.llava_engine.preprocess
    op(*right)
    wrong = [
        (0, out[:4]),
        (0, out[:, :8].contiguous()),
        (1, uploaded[:3279]),
        (1, uploaded.int()),
        (2, [0, 5]),
        (2, [0, 50, 70]),
        (2, [-4, 5, 7]),
        (2, [0, 1 << 31, 1 << 31]),
        (3, 330),  # not where a float may lie
        (3, 1 << 40),
        (4, []),
        (4, [ROWS, 3180, 4, 5]),
        (4, [ROWS, 3180, 5, 1 << 20]),
        (4, [ROWS, 3180, 5, 5] * 3),
        (5, 0),
        (5, 6),
        (6, [5, 7, 1, 0]),
        (6, [5, 7, 0, -1]),
        (6, [5, 7]),
    ]
    for place, value in wrong:
        with pytest.raises(RuntimeError):
            op(*right[:place], value, *right[place + 1 :])
    torch.cuda.synchronize()


def test_uploads_of_any_layout_one_right_after_the_other(generator: np.random.Generator) -> None:
    streams = DeviceStreams(GPU)
    picture = generator.integers(0, 256, (900, 1500, 3), dtype=np.uint8)
    long = generator.integers(0, 256, (3, 500_000, 3), dtype=np.uint8)  # rows longer than a piece
    arrays = [
        picture[:, 200:1100],
        generator.integers(-9, 9, (7, 336), dtype=np.int32),
        generator.standard_normal((256, 3)).astype(np.float32),
        picture,
        picture[5:6, 3:4],
        long[:, 1:],
        picture[::-1],
        picture[:, ::2],
    ]
    for array in arrays:
        array.flags.writeable = False
    for busy in (False, True):
        if busy:  # so that the pieces are full, and no copy is done, when the next upload comes
            torch.cuda._sleep(20_000_000)
        copies = [
            uploaded_arrays(streams, arrays[turn:] + arrays[:turn]) for turn in range(len(arrays))
        ]
        for turn, uploaded in enumerate(copies):
            for copy, array in zip(uploaded, arrays[turn:] + arrays[:turn], strict=True):
                np.testing.assert_array_equal(copy.cpu().numpy(), array, strict=True)


def test_uploads_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with kernels="reference", where nobody has built it."""

    def lacking() -> None:
        raise KernelsNotBuilt("it is not there")

    monkeypatch.setattr(streams_module, "c_library", lacking)
    arrays = [np.arange(12, dtype=np.int32).reshape(3, 4), np.ones((9, 8, 3), np.uint8)[:, 2:5]]
    for copy, array in zip(uploaded_arrays(DeviceStreams(GPU), arrays), arrays, strict=True):
        assert copy.is_cuda
        np.testing.assert_array_equal(copy.cpu().numpy(), array, strict=True)


@pytest.mark.parametrize("captures", [False, True])
def test_features_are_those_of_pictures_that_the_cpu_resampled(
    captures: bool, tmp_path: Path, generator: np.random.Generator
) -> None:
    make_checkpoint(tmp_path)
    model = load_model(tmp_path, device=GPU, dtype=torch.float16)
    side = model.config.vision.image_size
    processor = ImageProcessorConfig(shortest_edge=side, crop_size=(side, side))
    images = [random_image(generator, 90 + 31 * n, 130 + 17 * n) for n in range(5)]
    streams = DeviceStreams(GPU)
    encode = PictureEncoder(model, streams, captures=captures)
    with torch.inference_mode(), streams.prefilling():
        for count in (1, 5):
            features = [
                torch.stack(
                    encode(
                        [
                            decoded_picture(image, processor, resample=cpu)
                            for image in images[:count]
                        ]
                    )
                )
                for cpu in (True, False)
            ]
            assert torch.equal(*features) and features[0].isfinite().all()
    torch.cuda.synchronize()
    encode.close()


def test_texts_are_those_of_pictures_that_the_cpu_resampled(
    monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator
) -> None:
    files = []
    for height, width in ((300, 200), (150, 400), (112, 112), (90, 210)):
        file = io.BytesIO()
        Image.fromarray(random_image(generator, height, width).pixels).save(file, "JPEG")
        files.append(file.getvalue())

    def texts() -> list[str]:
        config = EngineConfig(device="cuda", kv_cache_mb=64)
        with WorkerPool(PoolConfig()) as pool:
            model = llava_engine.get("llava-tiny", config, pool=pool)
            return [
                model.describe_image(file, "What is there?", max_new_tokens=32).text()
                for file in files
            ]

    def resampling(*args: Any, **options: Any) -> PictureCache:
        return PictureCache(*args, **{**options, "resample": True})

    on_the_gpu = texts()
    monkeypatch.setattr(backend, "PictureCache", resampling)
    assert texts() == on_the_gpu
