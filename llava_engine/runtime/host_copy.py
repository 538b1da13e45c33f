"""Copies of arrays to a device from memory that is not pinned, in one call that gives up the GIL.

csrc/host_copy.cpp does it, with a few threads of its own: a single one copies slower than the bus.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The threads write pieces of pinned memory in turn, which the device reads meanwhile. Few enough to
# stay in the processor's caches.
PIECES = 16
PIECE_BYTES = 512 << 10
_MOST_THREADS = 4
_BYTES_A_THREAD = 512 << 10  # for less than that another one would not pay: it takes some 20 us


class _HostArray(ctypes.Structure):
    """llava_host_array of csrc/host_copy.cpp."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("place", ctypes.c_int64),
    )


class HostCopies:
    """Queues copies to one device. Its owner's thread uses it, one call after the other.

    library: the compiled one. pinned: uint8 [PIECES, PIECE_BYTES]. copied: a cudaEvent_t for each
    piece, which the caller keeps.
    """

    def __init__(
        self, library: ctypes.CDLL, device: int, pinned: torch.Tensor, copied: list[int]
    ) -> None:
        self._library = library
        library.llava_engine_error_text.restype = ctypes.c_char_p
        self._device = device
        self._pinned = pinned
        self._copied = (ctypes.c_void_p * len(copied))(*copied)
        self._most_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))

    def send(
        self, there: int, arrays: list[npt.NDArray[Any]], places: list[int], stream: int
    ) -> None:
        """Copy each array to byte `place` of `there`, on `stream`; its rows come to lie in a row.

        The places are in order and do not overlap. When this returns, the arrays have been read.
        Raises RuntimeError.
        """
        arrays = [_of_rows(array) for array in arrays]  # held until the call has returned
        parts = (_HostArray * len(arrays))(*map(_host_array, arrays, places))
        threads = min(self._most_threads, sum(a.nbytes for a in arrays) // _BYTES_A_THREAD)
        error = self._library.llava_engine_upload(
            self._device,
            ctypes.c_void_p(stream),
            ctypes.c_void_p(there),
            parts,
            len(parts),
            ctypes.c_void_p(self._pinned.data_ptr()),
            self._copied,
            len(self._copied),
            ctypes.c_int64(self._pinned.shape[1]),
            max(threads, 1),
        )
        if error != 0:
            text = self._library.llava_engine_error_text(error).decode()
            raise RuntimeError(f"arrays cannot be copied to the device: {text} ({error})")


def _of_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or a copy if even what lies in one row of it lies apart."""
    whole = array.flags.c_contiguous or array[0].flags.c_contiguous
    return array if whole else np.ascontiguousarray(array)


def _host_array(array: npt.NDArray[Any], place: int) -> _HostArray:
    if array.flags.c_contiguous:
        return _HostArray(array.ctypes.data, 1, array.nbytes, 0, place)
    return _HostArray(array.ctypes.data, len(array), array[0].nbytes, array.strides[0], place)
