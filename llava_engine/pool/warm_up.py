"""What a cold start can do before it knows anything: import torch and, beside that, wake the GPU.

Making a CUDA context takes a good part of a second that the driver spends without Python, and so
does importing torch without the driver. Imports no torch before it is asked to.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llava_engine.pool.stages import Stages

_DRIVER = "libcuda.so.1"


@contextmanager
def warmed_up(device: str, stages: Stages) -> Iterator[None]:
    """Import what workers need; the CUDA context that was made meanwhile is held for the block.

    device: as in EngineConfig; without "cuda:N" only the sole GPU is woken, since the model may be
    put on any. Who uses the context has it for good, and otherwise it ends with the block.
    """
    contexts: list[_Context] = []

    def wake() -> None:
        with stages("context"):
            context = _Context.of(device)
            if context is not None:
                contexts.append(context)

    thread = None
    if device != "cpu":
        thread = threading.Thread(target=wake, name="llava-context", daemon=True)
        thread.start()
    try:
        with stages("imports"):
            import llava_engine.pool.backend  # noqa: F401
        if thread is not None:
            thread.join()  # or another stage would wait for the driver and be blamed
        yield
    finally:
        if thread is not None:
            thread.join()
        for context in contexts:
            context.release()


class _Context:
    """A reference to a GPU's primary context, the one that torch uses, too.

    See "Primary Context Management" in the CUDA driver API.
    """

    def __init__(self, driver: ctypes.CDLL, gpu: ctypes.c_int) -> None:
        self._driver = driver
        self._gpu = gpu

    @classmethod
    def of(cls, device: str) -> _Context | None:
        """None where there is no driver, no such GPU, or a choice of several."""
        try:
            driver = ctypes.CDLL(_DRIVER)
            return cls._retained(driver, device)
        except (OSError, AttributeError):  # there is none, or one that is no whole driver
            return None

    @classmethod
    def _retained(cls, driver: ctypes.CDLL, device: str) -> _Context | None:
        count, gpu, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return None
        _, named, index = device.partition(":")
        if not named and count.value != 1:
            return None
        if driver.cuDeviceGet(ctypes.byref(gpu), int(index or 0)):
            return None
        if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu):
            return None
        return cls(driver, gpu)

    def release(self) -> None:
        self._driver.cuDevicePrimaryCtxRelease_v2(self._gpu)
