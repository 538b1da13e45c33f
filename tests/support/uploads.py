"""Uploads as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_engine.runtime.streams import DeviceStreams


def uploaded_arrays(streams: DeviceStreams, arrays: list[npt.NDArray[Any]]) -> list[torch.Tensor]:
    """Copies of arrays on the device, views of one upload."""
    there, places = streams.upload(arrays)
    return [
        there[place : place + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, place in zip(arrays, places, strict=True)
    ]
