"""The resampling ops' references against Pillow, and against the whole CPU path, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.kernels import poisoned
from support.pictures import odd_pictures, picture, random_image, random_images, rows_of

from llava_engine.image.load import LoadedImage
from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture, preprocess
from llava_engine.kernels.preprocess import COLUMNS, ROWS
from llava_engine.kernels.preprocess import preprocess as preprocess_op
from llava_engine.network.clip import patch_rows
from llava_engine.runtime.streams import DeviceStreams

ODD = odd_pictures()


@pytest.fixture
def generator() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy  # fresh pictures every time
    print("seed", seed)
    return np.random.default_rng(seed)


def expected(image: LoadedImage, processor: ImageProcessorConfig, patch: int) -> torch.Tensor:
    return patch_rows(torch.from_numpy(preprocess(image, processor))[None], patch)[0]


def test_300_random_sizes_are_pillows(generator: np.random.Generator) -> None:
    """Pillow's own resize and then the crop, by nothing of the engine's."""
    both = 0
    for _ in range(300):
        height, width = (int(side) for side in np.exp(generator.uniform(0, 6, 2)))
        high = int(generator.integers(9, 130))
        wide = int(high * generator.uniform(0.4, 2.5)) + 1
        # So much of the whole that preprocess() leaves it to Pillow whole.
        side = int(generator.integers(-(-max(high, wide) // 4), min(high, wide) + 1))
        filter = int(generator.integers(1, 6))
        plain = ImageProcessorConfig(
            shortest_edge=None,
            size=(high, wide),
            crop_size=(side, side),
            resample=filter,
            do_rescale=False,
            do_normalize=False,
        )
        image = random_image(generator, height, width)
        decoded = decoded_picture(image, plain, resample=False)
        both += len(decoded.passes) == 2
        resized = np.asarray(Image.fromarray(image.pixels).resize((wide, high), filter))
        top, left = (high - side) // 2, (wide - side) // 2
        pixels = resized[top : top + side, left : left + side].transpose(2, 0, 1)
        ours = rows_of(decoded, side)[0, : 3 * side * side].reshape(3, side, side)
        np.testing.assert_array_equal(ours, pixels, f"{image.pixels.shape} {plain}")
    assert both > 100


@pytest.mark.parametrize("resampled", [False, True])
def test_300_random_pictures_are_as_preprocess_has_them(
    resampled: bool, generator: np.random.Generator
) -> None:
    two = 0
    for image, processor, patch in random_images(generator, 300):
        decoded = decoded_picture(image, processor, resample=resampled)
        two += len(decoded.passes) == 2
        ours = rows_of(decoded, patch)
        assert torch.equal(ours, expected(image, processor, patch)), (image.pixels.shape, processor)
    assert (two > 50) is not resampled


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("padded", [False, True])
def test_odd_pictures(name: str, padded: bool) -> None:
    processor = ImageProcessorConfig(shortest_edge=56, crop_size=(56, 56), do_pad=padded)
    decoded = decoded_picture(ODD[name], processor, resample=False)
    assert torch.equal(rows_of(decoded, 14), expected(ODD[name], processor, 14))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_are_rounded_to_the_models_type(dtype: torch.dtype) -> None:
    processor = ImageProcessorConfig(shortest_edge=50, crop_size=(56, 56))
    image = ODD["portrait"]
    decoded = decoded_picture(image, processor, resample=False)
    ours = rows_of(decoded, 9, dtype=dtype)  # 2 pixels of each side are beyond the last patch
    assert ours.shape == (36, 248) and not ours[:, 243:].any()
    assert torch.equal(ours, expected(image, processor, 9).to(dtype))


def test_only_what_the_crop_shows_is_uploaded(generator: np.random.Generator) -> None:
    processor = ImageProcessorConfig(shortest_edge=336, crop_size=(336, 336))
    image = random_image(generator, 1080, 1920)
    decoded = decoded_picture(image, processor, resample=False)
    # 336 columns of 597, and a bicubic filter's 2 output pixels at each side.
    assert decoded.pixels.shape[0] == 1080
    assert 336 * 1920 / 597 < decoded.pixels.shape[1] < 341 * 1920 / 597
    assert np.shares_memory(decoded.pixels, image.pixels)
    assert decoded.nbytes == image.pixels.nbytes


def test_tall_pictures_are_resampled_along_their_rows_first(
    generator: np.random.Generator,
) -> None:
    processor = ImageProcessorConfig(shortest_edge=56, crop_size=(56, 56))
    for size, order in (((240, 100), [ROWS, COLUMNS]), ((190, 100), [COLUMNS, ROWS])):
        image = random_image(generator, *size)
        decoded = decoded_picture(image, processor, resample=False)
        assert [each.axis for each in decoded.passes] == order
        assert torch.equal(rows_of(decoded, 14), expected(image, processor, 14))


@pytest.mark.parametrize("size", [(7_000, 2_000), (60_000, 60)], ids=str)
def test_what_is_too_much_for_a_device_is_resampled_here(size: tuple[int, int]) -> None:
    processor = ImageProcessorConfig(shortest_edge=None, size=(20, 20), do_center_crop=False)
    image = LoadedImage(np.zeros((*size, 3), np.uint8), b"", 1)
    decoded = decoded_picture(image, processor, resample=False)
    assert decoded.pixels.shape == (20, 20, 3) and decoded.nbytes == 1200


def test_a_picture_of_another_size_than_the_rows_is_refused() -> None:
    image = picture(np.zeros((5, 7, 3), np.uint8))
    uploaded, places = DeviceStreams(torch.device("cpu")).upload(image.arrays)
    for patch in (2, 4):
        with pytest.raises(ValueError, match="5 x 7 has no 4 patches"):
            preprocess_op(torch.zeros(4, 48), image, uploaded, places, patch)


@pytest.mark.parametrize("passes", [[ROWS, 80, 5, 4], [ROWS, 80, 5, 4, COLUMNS, 160, 5, 6]])
def test_schema_and_fake(passes: list[int]) -> None:
    torch.library.opcheck(
        torch.ops.llava_engine.preprocess.default,
        (
            poisoned(6, 16),
            torch.zeros(3352, dtype=torch.uint8),
            [0, 4, 6],
            280,
            passes,
            2,
            [4, 6, 0, 0],
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
