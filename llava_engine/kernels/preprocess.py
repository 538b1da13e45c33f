"""Decoded pixels to the rows of patches that a vision tower takes.

Resampling is Pillow's, bit for bit: one axis after the other with an 8-bit picture between, sums in
32-bit integers of weights in units of 2^-22 (libImaging/Resample.c). The weights come from image/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        """What `preprocess` needs on its device, in the order of its `places`."""
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
    out: torch.Tensor,
    picture: DecodedPicture,
    uploaded: torch.Tensor,
    places: Sequence[int],
    patch: int,
) -> None:
    """out = the rows of the picture's patches: resampled, put in place, levels to values.

    out: float16, bfloat16 or float32 [patches, 3 * patch * patch or more], from left to right, then
    down; a row's columns by channel, then y, then x, and 0 behind those. uploaded: uint8 [bytes]
    on out's device, with each of picture.arrays, dense, at its byte of `places`, a multiple of 4.
    patch: pixels of a patch's side. Raises ValueError or RuntimeError where sizes do not belong
    together.
    """
    pixels, levels, *tables = places
    passes = []
    for step, place in zip(picture.passes, tables, strict=True):
        passes += [step.axis, place, *step.taps.shape]
    shown = [pixels, *picture.pixels.shape[:2]]
    _preprocess(out, uploaded, shown, levels, passes, patch, [*picture.size, *picture.offset])


def _preprocess_reference(
    out: torch.Tensor,
    uploaded: torch.Tensor,
    pixels: Sequence[int],
    levels: int,
    passes: Sequence[int],
    patch: int,
    place: Sequence[int],
) -> None:
    def array(place: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        return uploaded[place : place + nbytes].view(dtype).view(shape)

    shown = array(pixels[0], torch.uint8, *pixels[1:], 3)
    for axis, table, *shape in zip(*[iter(passes)] * 4, strict=True):
        shown = _resampled(shown, array(table, torch.int32, *shape), axis)
    height, width, top, left = place
    ground = shown.new_zeros(height, width, 3)
    ground[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    down, across, area = height // patch, width // patch, patch * patch
    if len(out) != down * across:
        raise ValueError(f"a picture of {height} x {width} has no {len(out)} patches")
    ground = ground[: down * patch, : across * patch]
    cells = ground.reshape(down, patch, across, patch, 3).permute(4, 0, 2, 1, 3)
    values = array(levels, torch.float32, 256, 3)
    for channel, cell in enumerate(cells.reshape(3, -1).int()):
        value = values[:, channel].index_select(0, cell)
        out[:, channel * area : (channel + 1) * area] = value.view(down * across, area)
    out[:, 3 * area :] = 0


def _resampled(pixels: torch.Tensor, taps: torch.Tensor, axis: int) -> torch.Tensor:
    """uint8 [h, w, 3] with n pixels on the axis."""
    first, start, weights = taps[0], taps[1:4], taps[4:]
    shape = (-1, 1, 1) if axis == ROWS else (-1, 1)
    total = start.T.unsqueeze(1) if axis == ROWS else start.T
    for place, weight in enumerate(weights):
        total = total + pixels.index_select(axis, first + place).int() * weight.view(shape)
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


# pixels: place, height, width. levels: place. passes: for each axis, place and the table's shape.
# place: the prepared picture's height and width, and where in it the pixels lie, top and left.
_preprocess = define(
    "preprocess(Tensor(a!) out, Tensor uploaded, int[] pixels, int levels, int[] passes, "
    "int patch, int[] place) -> ()",
    _preprocess_reference,
)
