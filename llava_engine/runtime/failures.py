"""What goes wrong on a device, and whose failure it is: a request's, or all of theirs."""

from __future__ import annotations

import torch

from llava_engine.errors import DeviceLost, LlavaError, MemoryExhausted, RequestFailed
from llava_engine.runtime.decode_loop import DeviceFailed

LOST = (torch.AcceleratorError, DeviceFailed)
"""After one of these the CUDA context is lost, and every sequence with it."""


def raise_if_lost(device: torch.device) -> None:
    """Raise AcceleratorError if the device is: a library may have wrapped its error."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_lost(device: torch.device) -> DeviceLost:
    """A new error for one stream; the caller attaches the cause."""
    return DeviceLost(f"{device} has failed; this process cannot use it any more.")


class MemoryErrors:
    """Whether a device ran out of memory where it cannot be told from the error: within our ops
    torch's OutOfMemoryError becomes a RuntimeError, but torch counts them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen = self._count()

    def happened(self) -> bool:
        """Since this was last asked, whoever it happened to: it is asked after every failure."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    def _count(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_ooms", 0))


def of_request(error: Exception, *, out_of_memory: bool = False) -> LlavaError:
    """What a request ends with whose step failed with `error`, maybe since memory was lacking."""
    if isinstance(error, LlavaError):
        return error
    wrapped: LlavaError
    if out_of_memory or isinstance(error, torch.OutOfMemoryError | MemoryError):
        wrapped = MemoryExhausted("The device ran out of memory during this request.")
    else:
        wrapped = RequestFailed(f"The model failed on this request: {type(error).__name__}.")
    wrapped.__cause__ = error
    return wrapped
