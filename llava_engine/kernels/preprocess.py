"""Decoded pixels to the rows of patches that a vision tower takes.

Resampling is Pillow's, bit for bit: one axis after the other with an 8-bit picture between, sums in
32-bit integers of weights in units of 2^-22 (libImaging/Resample.c). The weights come from image/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_engine.kernels.library import define

PRECISION_BITS = 22
"""Of a weight's fraction; Pillow's own."""

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The resampling of one axis to n pixels, each the sum of k pixels in a row.

    axis: ROWS or COLUMNS. taps: int32 [4 + k, n]. Row 0 is each one's first source pixel, rows 1 to
    3 what its sum starts with in each channel (a half, and what pixels give that are beyond the
    source), the other rows its weights, in units of 2^-22. All first + k are within the source.
    """

    axis: int
    taps: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DecodedPicture:
    """Pixels in the host's memory, and all that is still to do with them. Nobody writes into it.

    pixels: uint8 [h, w, 3]; the rows may lie apart. passes: one or two. offset: (top, left), where
    what they give lies in the prepared picture of `size` (height, width); around it is level 0.
    levels: float32 [256, 3], what a level becomes in each channel. nbytes: of memory that it holds.
    """

    pixels: npt.NDArray[np.uint8]
    passes: tuple[Pass, ...]
    size: tuple[int, int]
    offset: tuple[int, int]
    levels: npt.NDArray[np.float32]
    nbytes: int

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """What `preprocess` needs on its device, in its order."""
        return [self.pixels, self.levels, *(each.taps for each in self.passes)]


def identity(axis: int, length: int) -> Pass:
    """The pass that changes nothing."""
    taps = np.zeros((5, length), np.int32)
    taps[0] = np.arange(length)
    taps[1:4] = 1 << (PRECISION_BITS - 1)
    taps[4] = 1 << PRECISION_BITS
    taps.flags.writeable = False
    return Pass(axis, taps)


def preprocess(
    out: torch.Tensor, picture: DecodedPicture, arrays: list[torch.Tensor], patch: int
) -> None:
    """out = the rows of the picture's patches: resampled, put in place, levels to values.

    out: [patches, width], from left to right, then down; a row's columns by channel, then y, then
    x, and 0 behind those. arrays: picture.arrays on out's device. patch: pixels of a patch's side.
    """
    pixels, levels, *taps = arrays
    for step, table in zip(picture.passes[:-1], taps, strict=False):
        shape = list(pixels.shape)
        shape[step.axis] = table.shape[1]
        middle = pixels.new_empty(shape)
        resample(middle, pixels, table, step.axis)
        pixels = middle
    last = picture.passes[-1].axis
    write_patches(out, pixels, taps[-1], last, levels, patch, *picture.size, *picture.offset)


def resample(out: torch.Tensor, pixels: torch.Tensor, taps: torch.Tensor, axis: int) -> None:
    """out = pixels resampled along an axis.

    pixels: uint8 [h, w, 3]. out: the same with n pixels on the axis. axis, taps: as in `Pass`.
    """
    _resample(out, pixels, taps, axis)


def write_patches(
    out: torch.Tensor,
    pixels: torch.Tensor,
    taps: torch.Tensor,
    axis: int,
    levels: torch.Tensor,
    patch: int,
    height: int,
    width: int,
    top: int,
    left: int,
) -> None:
    """The last pass: as `resample`, then laid at (top, left) on a ground of level 0 that is height
    x width, levels turned into values, and the patches written to out as in `preprocess`.

    out: float16, bfloat16 or float32 [patches, 3 * patch * patch or more]. Raises ValueError or
    RuntimeError where sizes do not belong together.
    """
    _write_patches(out, pixels, taps, axis, levels, patch, height, width, top, left)


def _resample_reference(
    out: torch.Tensor, pixels: torch.Tensor, taps: torch.Tensor, axis: int
) -> None:
    out.copy_(_resampled(pixels, taps, axis))


def _resampled(pixels: torch.Tensor, taps: torch.Tensor, axis: int) -> torch.Tensor:
    """Levels, int32 [h, w, 3]."""
    first, start, weights = taps[0], taps[1:4], taps[4:]
    shape = (-1, 1, 1) if axis == ROWS else (-1, 1)
    total = start.T.unsqueeze(1) if axis == ROWS else start.T
    for place, weight in enumerate(weights):
        total = total + pixels.index_select(axis, first + place).int() * weight.view(shape)
    return (total >> PRECISION_BITS).clamp_(0, 255)


def _write_patches_reference(
    out: torch.Tensor,
    pixels: torch.Tensor,
    taps: torch.Tensor,
    axis: int,
    levels: torch.Tensor,
    patch: int,
    height: int,
    width: int,
    top: int,
    left: int,
) -> None:
    shown = _resampled(pixels, taps, axis)
    ground = pixels.new_zeros(height, width, 3)
    ground[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    down, across, area = height // patch, width // patch, patch * patch
    if len(out) != down * across:
        raise ValueError(f"a picture of {height} x {width} has no {len(out)} patches")
    ground = ground[: down * patch, : across * patch]
    cells = ground.reshape(down, patch, across, patch, 3).permute(4, 0, 2, 1, 3)
    for channel, cell in enumerate(cells.reshape(3, -1).int()):
        value = levels[:, channel].index_select(0, cell)
        out[:, channel * area : (channel + 1) * area] = value.view(down * across, area)
    out[:, 3 * area :] = 0


_resample = define(
    "resample(Tensor(a!) out, Tensor pixels, Tensor taps, int axis) -> ()",
    _resample_reference,
)
_write_patches = define(
    "write_patches(Tensor(a!) out, Tensor pixels, Tensor taps, int axis, Tensor levels, int patch, "
    "int height, int width, int top, int left) -> ()",
    _write_patches_reference,
)
