"""One axis of a picture resampled as Pillow does it: by Pillow itself, whole or a window of it, and
as the tables from which kernels.preprocess does the same on any device.

Knows pixels and sizes; nothing of processors and of what the pixels are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_engine.image.load import Pixels
from llava_engine.kernels.preprocess import PRECISION_BITS, Pass, identity

# Pillow's filters by number: half their width in source pixels at scale 1 (libImaging/Resample.c).
# NEAREST (0) is no filter there and no LLaVA checkpoint uses it.
FILTER_SUPPORT = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
# Up to this factor the whole axis is resampled (bit-equal to Pillow) rather than a window of it.
WHOLE_AXIS = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis (0 rows, 1 columns) resampled from `length` to `resized`, of which start..stop show.

    A window of the output is computed where the whole would be much longer. Its filter taps are the
    same, since enough source pixels are kept beyond its edges.
    """

    axis: int
    length: int
    resized: int
    start: int
    stop: int
    filter: int

    @property
    def scale(self) -> float:
        return self.length / self.resized

    @property
    def whole(self) -> bool:
        return self.resized <= WHOLE_AXIS * (self.stop - self.start)

    @property
    def first(self) -> int:
        """The first source pixel of the window."""
        return 0 if self.whole else max(0, math.floor(self.start * self.scale) - self.reach)

    @property
    def last(self) -> int:
        end = math.ceil(self.stop * self.scale) + self.reach
        return self.length if self.whole else min(self.length, end)

    @property
    def reach(self) -> int:
        """Source pixels to each side that the filter may touch, and one for rounding."""
        return math.ceil(FILTER_SUPPORT[self.filter] * max(self.scale, 1.0)) + 1

    def cut(self, pixels: Pixels) -> Pixels:
        """The source pixels that the shown ones are computed from."""
        return _along(pixels, self.axis, self.first, self.last)

    def resample(self, pixels: Pixels) -> Pixels:
        """From what `cut` kept to the shown pixels."""
        if self.whole:
            pixels = _resize(pixels, self.axis, 0, self.length, self.resized, self.filter)
            return _along(pixels, self.axis, self.start, self.stop)
        box = self.start * self.scale - self.first, self.stop * self.scale - self.first
        return _resize(pixels, self.axis, *box, self.stop - self.start, self.filter)

    def taps(
        self, offset: int, there: int, background: tuple[int, ...]
    ) -> tuple[int, int, Pass | None]:
        """Where the pixels begin and end that the shown ones are computed from, and the pass over
        them that gives these; None if they are the same.

        offset, there: the picture's own pixels on the axis; around them lies the background.
        """
        low, high, table = _taps(self, offset, there, background)
        return low, high, None if table is None else Pass(self.axis, table)


def rows_first(rows: Axis, columns: Axis) -> bool:
    """Whether Pillow, from 13 on, resamples the rows before the columns; it rounds in between."""
    less = rows.length - rows.resized
    return less > 0 and less > 2 * (columns.length - columns.resized)


def resample_narrow(pixels: Pixels, axis: Axis, background: tuple[int, ...]) -> Pixels:
    """The shown pixels of an axis, resampled as if the picture were padded to its length before."""
    at, scale, reach = axis.axis, axis.scale, axis.reach
    length = pixels.shape[at]
    offset = (axis.length - length) // 2
    start = max(axis.start, math.floor((offset - reach) / scale))
    stop = min(axis.stop, math.ceil((offset + length + reach) / scale))
    if start >= stop:  # the crop shows nothing of the picture
        return pad_axis(_along(pixels, at, 0, 0), at, 0, axis.stop - axis.start, background)
    first = max(0, min(offset, math.floor(start * scale) - reach))
    last = min(axis.length, max(offset + length, math.ceil(stop * scale) + reach))
    strip = pad_axis(pixels, at, offset - first, last - first, background)
    box = start * scale - first, stop * scale - first
    strip = _resize(strip, at, *box, stop - start, axis.filter)
    return pad_axis(strip, at, start - axis.start, axis.stop - axis.start, background)


@lru_cache(maxsize=32)
def _taps(
    axis: Axis, offset: int, there: int, background: tuple[int, ...]
) -> tuple[int, int, npt.NDArray[np.int32] | None]:
    """Axis.taps, the table alone."""
    weights, first = _weights(axis)
    # Of each pixel's weights only those of pixels that are there stay; the others times the
    # background are what its sum starts with.
    place = first[:, None] + np.arange(weights.shape[1])
    inside = (place >= offset) & (place < offset + there)
    start = np.maximum(first, offset)
    count = inside.sum(axis=1)
    seen = count > 0
    low = int(start[seen].min()) if seen.any() else offset
    high = int((start + count)[seen].max()) if seen.any() else offset + 1
    most = max(int(count.max()), 1)
    # All pixels get as many weights, within low..high.
    fitted = np.clip(start, low, high - most)
    source = fitted[:, None] - first[:, None] + np.arange(most)
    kept = np.take_along_axis(weights, np.clip(source, 0, weights.shape[1] - 1), axis=1)
    used = (source >= 0) & (source < weights.shape[1])
    table = np.empty((4 + most, len(first)), np.int32)
    table[0] = fitted - low
    beyond = np.where(inside, 0, weights).sum(axis=1)
    for channel in range(3):
        table[1 + channel] = (1 << (PRECISION_BITS - 1)) + beyond * background[channel]
    table[4:] = np.where(used, kept, 0).T
    table.flags.writeable = False
    same = identity(axis.axis, high - low).taps
    return low - offset, high - offset, None if np.array_equal(table, same) else table


def _weights(axis: Axis) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pillow's fixed-point weights [n, k] of the shown pixels, and the place of the first of each.

    Computed in its order, so that not even a rounding differs: precompute_coeffs and
    normalize_coeffs_8bpc of libImaging/Resample.c.
    """
    shown = np.arange(axis.start, axis.stop)
    if axis.resized == axis.length:  # Pillow leaves out the pass
        return np.full((len(shown), 1), 1 << PRECISION_BITS), shown
    support = FILTER_SUPPORT[axis.filter] * max(axis.scale, 1.0)
    centre = (shown + 0.5) * axis.scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), axis.length) - first
    tap = np.arange(count.max())
    distance = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / max(axis.scale, 1.0))
    exact = np.where(tap < count[:, None], _FILTERS[axis.filter](distance), 0.0)
    total = exact.cumsum(axis=1)[:, -1:]  # one after the other, which sum() does not do
    exact = np.divide(exact, total, out=exact, where=total != 0)
    scaled = exact * (1 << PRECISION_BITS)
    return (scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64), first


Samples = npt.NDArray[np.float64]


def _box(x: Samples) -> Samples:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Samples) -> Samples:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _hamming(x: Samples) -> Samples:
    # Its two constants are floats there.
    low, high = float(np.float32(0.54)), float(np.float32(0.46))
    window = low + high * _each(math.cos, x * math.pi)
    return np.where(np.abs(x) < 1.0, _sinc(x) * window, 0.0)


def _bicubic(x: Samples) -> Samples:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: Samples) -> Samples:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: Samples) -> Samples:
    angle = x * math.pi
    return np.where(angle == 0, 1.0, _each(math.sin, angle) / np.where(angle == 0, 1.0, angle))


def _each(function: Callable[[float], float], x: Samples) -> Samples:
    """The C library's function, as Pillow calls it: numpy's own may round otherwise."""
    return np.fromiter(map(function, x.ravel()), np.float64, x.size).reshape(x.shape)


_FILTERS: dict[int, Callable[[Samples], Samples]] = {
    1: _lanczos,
    2: _bilinear,
    3: _bicubic,
    4: _box,
    5: _hamming,
}


def _resize(
    pixels: Pixels, axis: int, start: float, stop: float, count: int, filter: int
) -> Pixels:
    """Resample source start..stop of one axis to `count` pixels, with Pillow."""
    stop = min(stop, float(pixels.shape[axis]))
    height, width = pixels.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if axis == 1:
        resized = image.resize((count, height), filter, box=(start, 0, stop, height))
    else:
        resized = image.resize((width, count), filter, box=(0, start, width, stop))
    return np.asarray(resized)


def _along(pixels: Pixels, axis: int, start: int, stop: int) -> Pixels:
    return pixels[start:stop] if axis == 0 else pixels[:, start:stop]


def pad_axis(pixels: Pixels, axis: int, before: int, total: int, colour: tuple[int, ...]) -> Pixels:
    """Lay pixels on a plain ground that is `total` long on this axis."""
    shape = [*pixels.shape]
    length, shape[axis] = shape[axis], total
    ground = np.empty(shape, np.uint8)
    ground[:1] = colour
    ground[1:] = ground[:1]  # row by row: ten times as fast as pixel by pixel
    _along(ground, axis, before, before + length)[:] = pixels
    return ground
