"""How long the stages of a model's cold start took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """Seconds that each stage of the last cold start took; any thread may go through one.

    What several threads spend in a stage at the same time counts once. Stages may run side by side:
    then they add up to more than the total.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._spans: dict[str, list[tuple[float, float]]] = {}
        self._recording = False

    @contextmanager
    def cold_start(self) -> Iterator[None]:
        """Forget what was, and record the stages that end before this block does."""
        with self._lock:
            self._spans, self._recording = {}, True
        try:
            with self("total"):
                yield
        finally:
            with self._lock:
                self._recording = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A stage. One that fails is not recorded, nor is one outside of a cold start."""
        began = self._clock()
        yield
        ended = self._clock()
        with self._lock:
            if self._recording:
                self._spans.setdefault(name, []).append((began, ended))

    def seconds(self) -> dict[str, float]:
        """By stage, in the order in which they first ended, "total" last."""
        with self._lock:
            spans = {name: sorted(spans) for name, spans in self._spans.items()}
        return {name: _covered(of_stage) for name, of_stage in spans.items()}


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans, which are in order."""
    total, until = 0.0, -float("inf")
    for began, ended in spans:
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
