"""The CUDA streams of a runtime: one to decode on, one for all other work.

On other devices there are no streams, and every context here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch

from llava_engine.errors import KernelsNotBuilt
from llava_engine.kernels.library import c_library
from llava_engine.runtime.host_copy import PIECE_BYTES, PIECES, HostCopies

_ALIGNMENT = 256  # bytes, of each array on the device


class DeviceStreams:
    """Decoding has the higher priority. Its stream and the prefill stream wait for each other: what
    one computes is there for the other, and neither runs beside it. Uploads have threads of their
    own, which `close` ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.decode: torch.cuda.Stream | None = None
        self.prefill: torch.cuda.Stream | None = None
        self._copies: HostCopies | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights may have been written on any stream
            self.decode = _stream(device, priority=-1)
            self.prefill = _stream(device)
            self._copies = self._host_copies(self.prefill)

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

    def upload(self, arrays: list[npt.NDArray[Any]]) -> tuple[torch.Tensor, list[int]]:
        """Copies of `arrays` on the device, for work of the current stream.

        They may be read-only, and their rows may lie apart; when this returns they have been read.
        Returns uint8 [bytes] and the byte at which each array begins, a multiple of 256.
        """
        places, total = [], 0
        for array in arrays:
            places.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        # On the current stream, not on one of their own: what is copied is needed next, and freeing
        # a tensor of two streams ends the process once the device is lost.
        there = torch.empty(total, dtype=torch.uint8, device=self._device)
        if self._copies is not None:
            # torch.cuda.current_stream() takes ten times as long, on a core that has slept 30 us.
            stream = torch._C._cuda_getCurrentRawStream(there.get_device())
            self._copies.send(there.data_ptr(), arrays, places, stream)
        else:
            for array, place in zip(arrays, places, strict=True):
                copy = torch.tensor(array).view(torch.uint8).view(-1)
                there[place : place + array.nbytes] = copy
        return there, places

    def close(self) -> None:
        """No more uploads. May be called again."""
        if self._copies is not None:
            self._copies.close()

    def _host_copies(self, stream: torch.cuda.Stream) -> HostCopies | None:
        """None without the compiled library, which those who chose the references may lack."""
        try:
            library = c_library()
        except KernelsNotBuilt:
            return None
        pinned = torch.empty(PIECES, PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._copied = [torch.cuda.Event() for _ in range(PIECES)]  # type: ignore[no-untyped-call]
        for event in self._copied:
            event.record(stream)  # before that it has no handle
        handles = [event.cuda_event for event in self._copied]
        return HostCopies(library, stream.device_index, pinned, handles)


def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
