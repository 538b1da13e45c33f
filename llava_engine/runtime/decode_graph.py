"""A decoding step captured as a CUDA graph, once per batch bucket.

Knows nothing of what a step computes but that it takes static tensors, a number of rows, and no
host synchronisation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from llava_engine.kernels.library import programmatic_launch


def bucket_of(rows: int, max_batch: int) -> int:
    """The rows that a graph for `rows` rows has: the next power of two, or all."""
    return min(1 << (rows - 1).bit_length(), max_batch)


class StepGraphs:
    """Captures a step for each bucket when it is first asked for.

    step: runs a step of the first n rows on the current stream. overlap: let its kernels start
    before their predecessors end. All graphs share their memory: one runs at a time, and none
    leaves anything there.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        stream: torch.cuda.Stream,
        *,
        max_batch: int,
        overlap: bool,
    ) -> None:
        self._step = step
        self._stream = stream
        self._max_batch = max_batch
        self._overlap = overlap
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __contains__(self, rows: int) -> bool:
        return bucket_of(rows, self._max_batch) in self._graphs

    def __call__(self, rows: int) -> int:
        """The raw cudaGraphExec_t for `rows` rows. It lives until `clear`.

        Where it must be captured, every row of the state is idle and a step runs before, so that
        what is allocated or chosen at first use is there.
        """
        bucket = bucket_of(rows, self._max_batch)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        return int(self._graphs[bucket].raw_cuda_graph_exec())

    def clear(self) -> None:
        """Drop every graph, when what is in flight is done: the tensors that they read move."""
        if self._graphs:
            try:
                self._stream.synchronize()
            finally:
                self._graphs.clear()

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        first = next(iter(self._graphs.values()), None)
        pool = None if first is None else first.pool()
        with torch.cuda.stream(self._stream), programmatic_launch(self._overlap):
            self._step(bucket)
            self._stream.synchronize()
            # Other threads may go on using the device: only this one's calls are held to the rules.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._step(bucket)
            except BaseException:
                # The stream must leave capture mode; why it could not be captured is known already.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph
