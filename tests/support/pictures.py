"""Random and odd pictures: decoded, as a request brings them, and as the float32 values that an
oracle takes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_engine.image.load import LoadedImage, load_image
from llava_engine.image.preprocess import ImageProcessorConfig
from llava_engine.kernels.preprocess import ROWS, DecodedPicture, identity, preprocess
from llava_engine.network.clip import patch_width
from llava_engine.runtime.streams import DeviceStreams

LEVELS = np.repeat(np.linspace(-2, 2, 256, dtype=np.float32)[:, None], 3, axis=1)


def random_pictures(seed: int, count: int, side: int) -> list[DecodedPicture]:
    """Pictures of a model's own size, so that nothing is to be resampled."""
    generator = np.random.default_rng(seed)
    shape = count, side, side, 3
    return [picture(pixels) for pixels in generator.integers(0, 256, shape, dtype=np.uint8)]


def picture(pixels: np.ndarray) -> DecodedPicture:
    """Of uint8 [height, width, 3]; the size may be one that no model takes."""
    height, width, _ = pixels.shape
    passes = (identity(ROWS, height),)
    return DecodedPicture(pixels, passes, (height, width), (0, 0), LEVELS, pixels.nbytes)


def values(picture: DecodedPicture) -> np.ndarray:
    """float32 [3, height, width] of one of these."""
    return picture.levels[picture.pixels, np.arange(3)].transpose(2, 0, 1)


def rows_of(
    picture: DecodedPicture,
    patch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> torch.Tensor:
    """The rows of a picture's patches as the op writes them on `device`, over poison."""
    height, width = picture.size
    shape = (height // patch) * (width // patch), patch_width(patch)
    rows = torch.full(shape, torch.nan, dtype=dtype, device=device)
    uploaded, places = DeviceStreams(torch.device("cpu")).upload(picture.arrays)
    preprocess(rows, picture, uploaded.to(device), places, patch)
    return rows


def random_images(
    generator: np.random.Generator, count: int
) -> Iterator[tuple[LoadedImage, ImageProcessorConfig, int]]:
    """Pictures of all sizes and proportions, with a processor and a patch's side each."""
    for index in range(count):
        height, width = (int(side) for side in np.exp(generator.uniform(0, 6, 2)))
        if index % 2:  # of the proportions that photos have
            width = max(1, int(height * generator.uniform(0.25, 4)))
        side, crop, high, wide = (int(size) for size in generator.integers(20, 120, 4))
        settings: dict[str, Any] = {"shortest_edge": side}
        if generator.random() < 0.3:
            settings = {"shortest_edge": None, "size": (high, wide)}
        settings["do_resize"] = generator.random() > 0.1
        processor = ImageProcessorConfig(
            crop_size=(crop, crop),
            resample=int(generator.integers(1, 6)),
            do_pad=bool(generator.integers(2)),
            **settings,
        )
        yield random_image(generator, height, width), processor, int(generator.integers(3, 15))


def random_image(generator: np.random.Generator, height: int, width: int) -> LoadedImage:
    return LoadedImage(generator.integers(0, 256, (height, width, 3), dtype=np.uint8), b"", 1)


def odd_pictures() -> dict[str, LoadedImage]:
    """Those of safety.md that can be read, decoded."""

    def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    def file(image: Image.Image, format: str, **options: Any) -> bytes:
        content = io.BytesIO()
        image.save(content, format, **options)
        return content.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    wide_grey = np.random.default_rng(1).integers(0, 1 << 16, (90, 70)).astype(np.uint16)
    frames = [noise(60, 80), noise(60, 80).rotate(90)]
    sources: dict[str, Any] = {
        "exif": file(noise(150, 70), "JPEG", exif=turned),
        "cmyk": file(noise(90, 60, "CMYK"), "JPEG"),
        "16 bits": file(Image.fromarray(wide_grey), "PNG"),
        "alpha": file(noise(90, 70, "RGBA"), "PNG"),
        "palette": file(noise(90, 70, "P"), "PNG", transparency=3),
        "gif": file(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": file(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "apng": file(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "1 x 1": np.full((1, 1, 3), 7, np.uint8),
        "3 x 3": np.arange(27, dtype=np.uint8).reshape(3, 3, 3),
        "4000 x 1": file(noise(4000, 1), "PNG"),
        "1 x 4000": file(noise(1, 4000), "PNG"),
        "5 x 4000": file(noise(5, 4000), "PNG"),
        "portrait": file(noise(108, 240), "JPEG"),
    }
    limits = {"max_bytes": 1 << 25, "max_pixels": 1 << 26}
    return {name: load_image(source, **limits) for name, source in sources.items()}
