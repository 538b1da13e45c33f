"""Names for stretches of the runtime's work, as NVTX ranges and in torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Ranges = Callable[[str], AbstractContextManager[object]]

_NOTHING = nullcontext()


def ranges(on: bool, device: torch.device) -> Ranges:
    """What opens a range of a name around a block; where it is not `on`, that does nothing."""
    if not on:
        return lambda name: _NOTHING
    nvtx = device.type == "cuda"

    @contextmanager
    def opened(name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            if not nvtx:
                yield
                return
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    return opened
