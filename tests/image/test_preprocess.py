"""preprocess against transformers' PIL processors, and against Pillow's resize then crop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_engine.errors import UnsupportedModel, WeightsError
from llava_engine.image.load import LoadedImage, load_image
from llava_engine.image.preprocess import ImageProcessorConfig, picture_key, preprocess

LLAVA = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
VARIANTS: list[dict[str, Any]] = [
    LLAVA,
    LLAVA | {"do_pad": True},
    {"size": {"shortest_edge": 40}, "crop_size": {"height": 57, "width": 64}},
    {"size": {"height": 48, "width": 64}, "do_center_crop": False, "resample": 2},
    {"size": {"height": 30, "width": 50}, "do_pad": True, "do_center_crop": False, "resample": 1},
    {"size": {"shortest_edge": 56}, "do_pad": True, "do_center_crop": False},
    {"do_resize": False, "crop_size": {"height": 64, "width": 57}},
    LLAVA | {"do_normalize": False},
    LLAVA | {"do_rescale": False, "resample": 4},
    LLAVA | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.25], "resample": 5},
]


def picture(height: int, width: int) -> LoadedImage:
    rng = np.random.default_rng(height * 10_007 + width)
    array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return load_image(array, max_bytes=1, max_pixels=1 << 26)


def processor(settings: dict[str, Any]) -> Any:
    kind = LlavaImageProcessorPil if "do_pad" in settings else CLIPImageProcessorPil
    return kind(**settings)


def config(settings: dict[str, Any], directory: Path) -> ImageProcessorConfig:
    processor(settings).save_pretrained(directory)
    return ImageProcessorConfig.from_directory(directory)


def levels(values: np.ndarray, settings: ImageProcessorConfig) -> np.ndarray:
    """Back to 0..255 for comparison."""
    values = values.astype(np.float64)
    if settings.do_normalize:
        mean, std = (np.array(x)[:, None, None] for x in (settings.image_mean, settings.image_std))
        values = values * std + mean
    return values / (settings.rescale_factor if settings.do_rescale else 1.0)


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_equal_to_transformers_on_random_sizes(index: int, tmp_path: Path) -> None:
    settings = config(VARIANTS[index], tmp_path)
    oracle = processor(VARIANTS[index])
    rng = np.random.default_rng(index)
    for height, width in rng.integers(8, 260, (20, 2)):
        image = picture(int(height), int(width))
        expected = oracle(Image.fromarray(image.pixels), return_tensors="np")["pixel_values"][0]
        ours = preprocess(image, settings)
        assert ours.dtype == np.float32 and ours.shape[1:] == settings.output_size
        assert ours.shape == expected.shape
        error = abs(levels(ours, settings) - levels(expected, settings)).max()
        assert error <= 1.01, (height, width)
        if max(height, width) <= 4 * min(height, width):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize(
    "size", [(1, 700), (700, 1), (3, 900), (31, 1900), (1900, 31), (130, 2601), (2601, 130)]
)
def test_the_window_equals_resize_then_crop(size: tuple[int, int], resample: int) -> None:
    settings = ImageProcessorConfig(
        shortest_edge=40,
        crop_size=(37, 41),
        resample=resample,
        do_rescale=False,
        do_normalize=False,
    )
    image = picture(*size)
    height, width = size
    short = min(size)
    full = (int(40 * width / short), int(40 * height / short))
    resized = np.asarray(Image.fromarray(image.pixels).resize(full, resample))
    top, left = (resized.shape[0] - 37) // 2, (resized.shape[1] - 41) // 2
    if left < 0:  # one column of zeros at the left, as transformers pads
        resized = np.pad(resized, ((0, 0), (-left, 0), (0, 0)))
        left = 0
    expected = resized[top : top + 37, left : left + 41].transpose(2, 0, 1)
    ours = preprocess(image, settings)
    error = abs(ours - expected)
    # Positions on a 4-byte float grid may tip a value that lies on a half; never more than that.
    assert error.max() <= 1 and error.mean() < 0.15


@pytest.mark.parametrize("size", [(300, 480), (480, 300), (450, 210)])
def test_a_small_crop_of_an_ordinary_picture_is_pillows_but_for_single_pixels(
    size: tuple[int, int],
) -> None:
    settings = ImageProcessorConfig(
        shortest_edge=200, crop_size=(30, 30), do_rescale=False, do_normalize=False
    )
    image = picture(*size)
    short = min(size)
    wide, high = int(200 * size[1] / short), int(200 * size[0] / short)
    resized = np.asarray(Image.fromarray(image.pixels).resize((wide, high), 3))
    top, left = (high - 30) // 2, (wide - 30) // 2
    expected = resized[top : top + 30, left : left + 30].transpose(2, 0, 1)
    # With the two passes in the other order a quarter of the pixels would be others.
    assert (preprocess(image, settings) != expected).mean() < 0.01


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (5, 800), (800, 5), (20, 900), (900, 20)])
@pytest.mark.parametrize("resample", [2, 3])
def test_a_narrow_picture_equals_pad_then_resize(size: tuple[int, int], resample: int) -> None:
    settings = ImageProcessorConfig(
        shortest_edge=56, crop_size=(56, 56), do_pad=True, resample=resample
    )
    oracle = LlavaImageProcessorPil(**LLAVA, do_pad=True, resample=resample)
    image = picture(*size)
    expected = oracle(Image.fromarray(image.pixels), return_tensors="np")["pixel_values"][0]
    error = abs(levels(preprocess(image, settings), settings) - levels(expected, settings))
    # Tall pictures are resampled in the other order, so a rounding or two of 8 bits may differ.
    assert error.max() <= (1.01 if size[0] < size[1] else 2.01) and error.mean() < 0.1


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (65_000, 1), (1, 65_000)])
def test_extreme_pictures_take_under_10_ms(size: tuple[int, int]) -> None:
    settings = ImageProcessorConfig(shortest_edge=336, crop_size=(336, 336))
    image = picture(*size)
    took = []
    for _ in range(5):
        started = time.perf_counter()
        assert preprocess(image, settings).shape == (3, 336, 336)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.010  # safety.md's bound


def test_defaults_are_transformers_defaults(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    ours = ImageProcessorConfig.from_directory(tmp_path)
    assert ours == config({}, tmp_path / "saved") == ImageProcessorConfig()


def test_the_nested_file_that_newer_transformers_write_wins(tmp_path: Path) -> None:
    nested = {"image_processor": processor(LLAVA).to_dict(), "processor_class": "LlavaProcessor"}
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 32}')
    assert ImageProcessorConfig.from_directory(tmp_path).output_size == (32, 32)
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14}')
    assert ImageProcessorConfig.from_directory(tmp_path).output_size == (32, 32)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessorConfig.from_directory(tmp_path).output_size == (56, 56)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "SiglipImageProcessor"},
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"do_pad": True},
        {"resample": 0},
        {"resample": "bicubic"},
        {"resample": [3]},
        {"size": {"longest_edge": 336}},
        {"size": {"shortest_edge": 10, "longest_edge": 20}},
        {"size": -1},
        {"size": 1 << 30},
        {"size": [336, 336]},
        {"crop_size": {"height": 1.5, "width": 3}},
        {"do_resize": "yes"},
        {"do_center_crop": False},
        {"do_resize": False, "do_center_crop": False},
        {"image_mean": 0.5},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, float("nan")]},
        {"image_std": [0.5, 0.5, 0]},
        {"rescale_factor": "1/255"},
    ],
)
def test_settings_that_are_not_understood(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel):
        ImageProcessorConfig.from_directory(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="missing"):
        ImageProcessorConfig.from_directory(tmp_path)
    for text in ("{", "[1]", "\x00", "[" * 100_000, '{"image_processor": 3}'):
        (tmp_path / "processor_config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"processor_config\.json"):
            ImageProcessorConfig.from_directory(tmp_path)


def test_keys_tell_pictures_sizes_and_variants_apart() -> None:
    first, other = picture(6, 4), picture(4, 6)
    small, large = ImageProcessorConfig(), ImageProcessorConfig(crop_size=(225, 224))
    keys = {picture_key(image, variant) for image in (first, other) for variant in (small, large)}
    assert len(keys) == 4 and all(len(key) == 16 for key in keys)
    assert picture_key(picture(6, 4), ImageProcessorConfig()) == picture_key(first, small)
    assert small.variant != large.variant and len(small.variant) == 16
