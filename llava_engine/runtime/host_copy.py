"""Copies of arrays to a device from memory that is not pinned, in one call that gives up the GIL.

csrc/host_copy.cpp does it, with a few threads of its own: a single one copies slower than the bus.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The threads write pieces of pinned memory in turn, which the device reads meanwhile. Few enough to
# stay in the processor's caches, and small enough that all threads have a part in most pictures.
PIECES = 64
PIECE_BYTES = 128 << 10
_MOST_THREADS = 8

_HOST_ARRAY = struct.Struct("=qqqqq")  # llava_host_array: source, rows, row_bytes, stride, place

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "open": (_pointer, [_int, _pointer, _pointer, _int, _int64, _int]),
    "upload": (_int, [_pointer, _pointer, _pointer, ctypes.c_char_p, _int]),
    "close": (None, [_pointer]),
}


class HostCopies:
    """Queues copies to one device. Its owner's thread uses it, one call after the other.

    library: the compiled one. pinned: uint8 [pieces, bytes of one]. copied: a cudaEvent_t for each
    piece, which the caller keeps. threads: so many copy at most, the one that calls among them;
    None: half of those that the processor runs at a time, up to 8.

    The others sleep between the calls; `close`, or forgetting it, ends them.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        device: int,
        pinned: torch.Tensor,
        copied: list[int],
        threads: int | None = None,
    ) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"llava_host_copier_{name}")
            function.restype, function.argtypes = result, arguments
        library.llava_engine_error_text.restype = ctypes.c_char_p
        if threads is None:
            threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))
        self._library = library
        self._pinned = pinned  # must outlive the copier
        self._handle: int | None = library.llava_host_copier_open(
            device,
            pinned.data_ptr(),
            (ctypes.c_void_p * len(copied))(*copied),
            len(pinned),
            pinned.shape[1],
            threads,
        )
        if self._handle is None:
            raise MemoryError("no memory for what copies arrays to the device")
        self._end = weakref.finalize(self, library.llava_host_copier_close, self._handle)
        # Not at the interpreter's exit: a daemon thread may be in an upload then.
        self._end.atexit = False

    def send(
        self, there: int, arrays: list[npt.NDArray[Any]], places: list[int], stream: int
    ) -> None:
        """Copy each array to byte `place` of `there`, on `stream`; its rows come to lie in a row.

        The places are in order and do not overlap. When this returns, the arrays have been read.
        Raises RuntimeError, also after `close`.
        """
        arrays = [_of_rows(array) for array in arrays]  # held until the call has returned
        parts = b"".join(map(_host_array, arrays, places))
        error = self._library.llava_host_copier_upload(
            self._handle, stream, there, parts, len(arrays)
        )
        if error != 0:
            text = self._library.llava_engine_error_text(error).decode()
            raise RuntimeError(f"arrays cannot be copied to the device: {text} ({error})")

    def close(self) -> None:
        """End the threads. May be called again."""
        self._handle = None
        self._end()


def _of_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or a copy if even what lies in one row of it lies apart."""
    whole = array.flags.c_contiguous or array[0].flags.c_contiguous
    return array if whole else np.ascontiguousarray(array)


def _host_array(array: npt.NDArray[Any], place: int) -> bytes:
    if array.flags.c_contiguous:
        return _HOST_ARRAY.pack(array.ctypes.data, 1, array.nbytes, 0, place)
    return _HOST_ARRAY.pack(array.ctypes.data, len(array), array[0].nbytes, array.strides[0], place)
