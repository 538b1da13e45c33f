"""The CUDA streams of a runtime: one to decode on, one for all other work, one for copies.

On other devices there are no streams, and every context here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Uploads pass through so many pieces of pinned memory in turn: while one is filled, those before it
# are on their way. Pinning what is to be copied would take longer than copying it.
_PIECES = 4
_PIECE_BYTES = 1 << 20
_ALIGNMENT = 256  # bytes, of each array on the device
_TYPES = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}


class DeviceStreams:
    """Decoding has the higher priority. Its stream and the prefill stream wait for each other: what
    one computes is there for the other, and neither runs beside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.decode: torch.cuda.Stream | None = None
        self.prefill: torch.cuda.Stream | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights may have been written on any stream
            self.decode = _stream(device, priority=-1)
            self.prefill, self._copy = _stream(device), _stream(device)
            self._pinned = torch.empty(_PIECES, _PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._copied = [torch.cuda.Event() for _ in range(_PIECES)]  # type: ignore[no-untyped-call]
            self._turn = 0

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Make the prefill stream current."""
        if self.decode is None or self.prefill is None:
            yield
            return
        with torch.cuda.stream(self.prefill):
            self.prefill.wait_stream(self.decode)
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Make the decode stream current, behind all that the prefill stream has to do."""
        if self.decode is None or self.prefill is None:
            yield
            return
        with torch.cuda.stream(self.decode):
            self.decode.wait_stream(self.prefill)
            yield

    def decoded(self) -> None:
        """Let the prefill stream wait for all that the decode stream has to do by now."""
        if self.decode is not None and self.prefill is not None:
            self.prefill.wait_stream(self.decode)

    def upload(self, arrays: list[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """Copies of `arrays` on the device, for work of the current stream.

        They may be read-only, and their rows may lie apart; when this returns they have been read.
        Of uint8, int32 or float32. The copies share their memory.
        """
        if self.decode is None:
            return [torch.tensor(array, device=self._device) for array in arrays]
        places, total = [], 0
        for array in arrays:
            places.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        with torch.cuda.stream(self._copy):
            there = torch.empty(total, dtype=torch.uint8, device=self._device)
            self._write(there, arrays, places)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copy)
        there.record_stream(current)
        return [
            there[place : place + array.nbytes].view(_TYPES[array.dtype.name]).view(array.shape)
            for array, place in zip(arrays, places, strict=True)
        ]

    def _write(
        self, there: torch.Tensor, arrays: list[npt.NDArray[Any]], places: list[int]
    ) -> None:
        """Queue the copies to `there`, piece by piece; one piece may hold parts of many arrays."""
        begin = end = 0  # what the piece holds of `there`
        piece = self._next_piece()
        for array, place in zip(arrays, places, strict=True):
            rows = _rows(array)
            while len(rows):
                room = max(0, begin + _PIECE_BYTES - place) // rows.shape[1]
                if room == 0:
                    self._send(there[begin:end])
                    begin, piece = place, self._next_piece()
                    continue
                taken, rows = rows[:room], rows[room:]
                end = place + taken.size
                piece[place - begin : end - begin].reshape(taken.shape)[:] = taken
                place = end
        self._send(there[begin:end])

    def _next_piece(self) -> npt.NDArray[np.uint8]:
        """The next piece of pinned memory, once it has been copied from."""
        self._turn = (self._turn + 1) % _PIECES
        self._copied[self._turn].synchronize()
        piece: npt.NDArray[np.uint8] = self._pinned[self._turn].numpy()
        return piece

    def _send(self, there: torch.Tensor) -> None:
        there.copy_(self._pinned[self._turn, : len(there)], non_blocking=True)
        self._copied[self._turn].record(self._copy)


def _rows(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The array's bytes as rows that fit into a piece: of one byte where all lie in a row."""
    if array.flags.c_contiguous or array[0].nbytes > _PIECE_BYTES:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)[:, None]
    return array.reshape(len(array), -1).view(np.uint8)


def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
