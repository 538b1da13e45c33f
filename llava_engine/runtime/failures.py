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


def of_request(error: Exception) -> LlavaError:
    """What a request ends with whose step failed with `error`."""
    if isinstance(error, LlavaError):
        return error
    wrapped: LlavaError
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        wrapped = MemoryExhausted("The device ran out of memory during this request.")
    else:
        wrapped = RequestFailed(f"The model failed on this request: {type(error).__name__}.")
    wrapped.__cause__ = error
    return wrapped
