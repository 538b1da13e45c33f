"""A decoding step captured as a CUDA graph, once per batch bucket."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llava_engine.runtime.graph import CapturedGraphs


def bucket_of(rows: int, max_batch: int) -> int:
    """The rows that a graph for `rows` rows has: the next power of two, or all."""
    return min(1 << (rows - 1).bit_length(), max_batch)


class StepGraphs:
    """Captures a step for each bucket when it is first asked for.

    step: runs a step of the first n rows on the current stream. overlap: let its kernels start
    before their predecessors end.
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
        self._max_batch = max_batch
        self._captured = CapturedGraphs(stream, overlap=overlap)
        self._buckets: dict[int, int] = {}

    def __contains__(self, rows: int) -> bool:
        return bucket_of(rows, self._max_batch) in self._buckets

    def __call__(self, rows: int) -> int:
        """The raw cudaGraphExec_t for `rows` rows. It lives until `clear`.

        Where it must be captured, every row of the state is idle. Raises RuntimeError.
        """
        bucket = bucket_of(rows, self._max_batch)
        if bucket not in self._buckets:
            self._buckets[bucket] = self._captured.capture(lambda: self._step(bucket))
        return self._buckets[bucket]

    def clear(self) -> None:
        """Drop every graph, when what is in flight is done: the tensors that they read move."""
        self._buckets.clear()
        self._captured.clear()
