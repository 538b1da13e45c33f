"""What the benches of ops share: sizes, how their calls are timed, and what nothing exceeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if ON_GPU:
    DTYPE, HIDDEN, WIDE, HEADS, DIM, VOCAB, BLOCK = torch.float16, 4096, 11008, 32, 128, 32064, 64
    FEATURES = 1024  # of a patch, which the projector takes
else:
    DTYPE, HIDDEN, WIDE, HEADS, DIM, VOCAB, BLOCK = torch.float32, 192, 384, 6, 32, 768, 64
    FEATURES = 192
L2_BYTES = 50 << 20

Call = Callable[[], object]


@dataclass
class Case:
    """One op at one size. make() gives a pair of calls, ours and torch's, on fresh buffers.

    nbytes: the fewest bytes that must move. flops: the operations, where they are the limit.
    """

    name: str
    nbytes: int
    make: Callable[[], tuple[Call, Call]]
    flops: int = 0


def half(*shape: int) -> torch.Tensor:
    """Random numbers in DTYPE, which is half precision on a GPU."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def replay_us(calls: list[Call]) -> float:
    """Microseconds per call of a graph that makes all of them, the median of 15 replays.

    On the CPU of calls one after the other, which nothing captures.
    """
    if not ON_GPU:
        return plain_us(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


def plain_us(calls: list[Call]) -> float:
    """Microseconds per call on the CPU, the median of 15 rounds of all of them."""
    times = []
    for _ in range(18):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    return statistics.median(times[3:])


def start_on_cpu(left_out: str) -> None:
    """Say what a run on the CPU is of, and keep it to one thread.

    The cores are shared: a second thread would often wait for its turn, and the first one for it.
    """
    torch.set_num_threads(1)
    print(f"cpu, one thread: references, llava-tiny's sizes, float32; left out: {left_out}")


def copy_ceiling() -> float:
    """GB/s of a large device copy, bytes read and written together: the better of torch's two."""
    source = torch.randint(1 << 60, (1 << 27,), device=DEVICE)
    target = torch.empty_like(source)
    by_copy = replay_us([lambda: target.copy_(source)] * 4)
    by_kernel = replay_us([lambda: torch.bitwise_not(source, out=target)] * 4)
    return 2 * source.nbytes / min(by_copy, by_kernel) / 1e3


def matmul_ceiling() -> float:
    """TFLOP/s of a large product of random matrices, by torch."""
    a, b = half(8192, 8192), half(8192, 8192)
    out = torch.empty_like(a)
    return 2 * 8192**3 / replay_us([lambda: torch.mm(a, b, out=out)] * 4) / 1e6
