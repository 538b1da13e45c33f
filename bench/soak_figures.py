"""What bench/soak.py reads of its process, and how it judges whether a figure grows."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

LIMIT_MB_H = 1.0
_JITTER = 3  # readings at either end of which device memory may differ
_STACK = 5 << 20  # bytes of a thread's stack, a size that nothing else maps
_GUARD = 64 << 10  # at most so much of it is mapped apart
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Rss: +([0-9]+) kB", re.M | re.S)


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Figures:
    """Readings of this process, taken while nothing runs.

    seconds: of time.monotonic(). rss: bytes, without stacks: bytes of threads' stacks, of which the
        pages that a thread has ever reached stay.
    heap: bytes that malloc has given out, all of Python's too under PYTHONMALLOC=malloc.
    device_allocated, device_used: bytes of torch's tensors, and in use on the whole card; empty
        without one.
    """

    def __init__(self, device: str) -> None:
        """Before any thread is started, whose stacks it will know by their size."""
        threading.stack_size(_STACK)
        fill_numpys_cache()
        self._device = None if device == "cpu" else torch.device(device)
        self._process = psutil.Process()
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _MallocInfo
        # Arrays, so that the readings themselves are next to no growth.
        self.seconds, self.heap = array("d"), array("d")
        self.rss, self.stacks = array("d"), array("d")
        self.threads, self.descriptors = array("l"), array("l")
        self.device_allocated, self.device_used = array("d"), array("d")

    def read(self) -> None:
        """Give back what the allocators keep for later, and take a reading."""
        gc.collect()
        self._libc.malloc_trim(0)
        info = self._libc.mallinfo2()
        self.seconds.append(time.monotonic())
        self.heap.append(info.uordblks + info.hblkhd)
        rss, stacks = resident_bytes()
        self.stacks.append(stacks)
        self.rss.append(rss)
        self.threads.append(self._process.num_threads())
        self.descriptors.append(self._process.num_fds())
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self._device)
            self.device_allocated.append(torch.cuda.memory_allocated(self._device))
            self.device_used.append(total - free)


def fill_numpys_cache() -> None:
    """numpy keeps up to seven freed blocks of each size under 1 KB, which takes it hours to reach:
    in 3.7 MB that are filled now, nothing will grow."""
    for size in range(1, 1024):
        kept = [np.empty(size, np.uint8) for _ in range(7)]
        del kept


def resident_bytes() -> tuple[int, int]:
    """RSS without the stacks of threads started since `Figures` was made, and that of the stacks.

    From smaps: statm, which psutil reads, may be wrong by 32 pages for each processor.
    """
    rss = [0, 0]
    for start, end, kib in _MAPPING.findall(Path("/proc/self/smaps").read_text()):
        is_stack = _STACK - _GUARD <= int(end, 16) - int(start, 16) <= _STACK
        rss[is_stack] += int(kib) << 10
    return rss[0], rss[1]


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Least squares: the slope, and half its 95 % interval, widened for autocorrelation.

    Infinite for fewer than 4 readings.
    """
    count = len(times)
    if count < 4:
        return 0.0, math.inf
    middle, mean = sum(times) / count, sum(values) / count
    spread = sum((t - middle) ** 2 for t in times)
    pairs = list(zip(times, values, strict=True))
    rise = sum((t - middle) * (v - mean) for t, v in pairs) / spread
    rest = [v - mean - rise * (t - middle) for t, v in pairs]
    squares = sum(r * r for r in rest)
    if squares == 0:
        return rise, 0.0
    lag = sum(a * b for a, b in zip(rest, rest[1:], strict=False)) / squares
    lag = min(0.95, max(0.0, lag))
    error = math.sqrt(squares / (count - 2) / spread * (1 + lag) / (1 - lag))
    return rise, 2.0 * error


def judge_memory(seconds: list[float], values: list[float]) -> dict[str, Any]:
    """The slope of `values` (bytes) in MB an hour, and "flat", "grows" or "undecided"."""
    rise, half = (3600 / 1e6 * value for value in slope(seconds, values))
    verdict = "undecided"
    if rise + half < LIMIT_MB_H:
        verdict = "flat"
    elif rise - half > LIMIT_MB_H:
        verdict = "grows"
    return {
        "slope_mb_per_hour": rise,
        "half_95_percent_interval": half if math.isfinite(half) else None,
        "limit_mb_per_hour": LIMIT_MB_H,
        "readings": len(seconds),
        "verdict": verdict,
    }


def judge_counts(what: str, counts: list[int]) -> list[str]:
    """A fault if there are more at the end than after warm-up."""
    if not counts:
        return [f"{what}: no reading after warm-up"]
    return (
        [f"{what}: {counts[0]} after warm-up, {counts[-1]} now"] if counts[-1] > counts[0] else []
    )


def judge_device(what: str, values: list[float]) -> list[str]:
    """A fault if the least of the last readings is above the most of the first after warm-up: the
    allocator deals in segments of megabytes, so that a slope says little."""
    if len(values) < 2 * _JITTER:
        return [f"{what}: too few readings after warm-up"]
    before, now = max(values[:_JITTER]), min(values[-_JITTER:])
    return [f"{what}: {before:.0f} bytes after warm-up, {now:.0f} now"] if now > before else []
