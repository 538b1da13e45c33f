"""The CUDA streams of a runtime: one to decode on, one for all other work, one for copies.

On other devices there are no streams, and every context here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """`host` on the device, for work of the current stream; copied from pinned memory."""
        if self.decode is None:
            return host.to(self._device)
        with torch.cuda.stream(self._copy):
            there = host.pin_memory().to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copy)
        there.record_stream(current)
        return there


def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
