"""Random pictures for models: decoded, as a request brings them, and as the float32 values that an
oracle takes."""

from __future__ import annotations

import numpy as np

from llava_engine.kernels.preprocess import ROWS, DecodedPicture, identity

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
