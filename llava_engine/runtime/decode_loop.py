"""What decodes a run of steps: the protocol, and `EagerLoop`, which runs a step in each `wait`.

A run is a number of decoding steps for the first rows of a DecodeState, which the caller has
filled. Knows rows and ring entries only; whose rows they are is the runtime's. The other
implementation, `native_loop.NativeLoop`, launches captured steps ahead and needs no GIL for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class TokenEvent(NamedTuple):
    """One sampled token.

    step: counted over all runs. row: of the DecodeState. finished: the row is idle from now on, by
    this token. time_ns: CLOCK_MONOTONIC (time.monotonic_ns) when the token was seen on the host.
    """

    step: int
    row: int
    token: int
    finished: bool
    time_ns: int


class DeviceFailed(RuntimeError):
    """The device reported an error, or stopped, in a run; nothing on it can be trusted any more."""


class DecodeLoop(Protocol):
    """`prepare`, `run`, `wait` and `close` belong to one thread; `stop` and `wake` to any.

    One run is on at a time: from `run` until `wait` says that it has ended, or raises.
    """

    def prepare(self, rows: int) -> None:
        """Get ready to step the first `rows` rows, before the state is filled: may capture a graph,
        which leaves every row idle. Raises what capturing raises; no run is on then."""

    def run(self, rows: int, first_step: int, max_steps: int, stop_at: int) -> None:
        """Start a run over rows 0 to `rows` - 1, all of them active, as prepared.

        Its steps are first_step, first_step + 1, ...: at most `max_steps`, which is at most the
        ring's length, and none but the first is started once `stop` was called or at most `stop_at`
        rows are unfinished. (The first is, so that no storm of stops can keep a batch from ever
        getting on.) Raises DeviceFailed, and ValueError while a run is on.
        """

    def wait(self, timeout: float | None) -> tuple[list[TokenEvent], bool]:
        """Tokens in the order of steps, and whether the run has ended: every step that was started
        is done and all its tokens are handed out, these included. True without a run, too.

        Blocks until there is either, `timeout` seconds passed (None: no limit), or `wake` or `stop`
        was called since the last `wait` returned, be it before this call. The list may be empty.
        Raises DeviceFailed; the run is over then.
        """

    def stop(self) -> None:
        """Start no further step in this run, and wake. Without a run it only wakes: a later run is
        not stopped by it. May be called at any time, also during and after `close`; takes no lock
        that a thread may hold while it runs Python code."""

    def wake(self) -> None:
        """Make a `wait` return now, or the next one at once. As `stop`, callable at any time."""

    def close(self) -> None:
        """Wait for the steps in flight and release everything; no-op when closed already."""


class EagerLoop:
    """Runs a step in each `wait`, in the caller's thread: on the CPU, and for the references.

    step: runs a step of the first n rows; the ring has its tokens when it returns. ring: int32
    [ring_steps, max_batch, 4], see kernels.decode_step. What `step` raises comes out of `wait`, and
    the run is over.
    """

    def __init__(self, step: Callable[[int], None], ring: torch.Tensor) -> None:
        self._step = step
        self._ring = ring.numpy()
        self._first = self._next = self._end = 0
        self._stop_at = 0
        self._unfinished: set[int] = set()
        self._stopped = False

    def prepare(self, rows: int) -> None:
        """Nothing is captured."""

    def run(self, rows: int, first_step: int, max_steps: int, stop_at: int) -> None:
        """See DecodeLoop."""
        if self._unfinished:
            raise ValueError("a run is on")
        self._first = self._next = first_step
        self._end = first_step + max_steps
        self._stop_at = stop_at
        self._unfinished = set(range(rows))
        self._rows = rows
        self._stopped = False

    def wait(self, timeout: float | None) -> tuple[list[TokenEvent], bool]:
        """See DecodeLoop; never blocks longer than a step takes."""
        if self._stopped and self._next > self._first:
            self._unfinished.clear()
        if not self._unfinished:
            return [], True
        try:
            self._step(self._rows)
        except BaseException:
            self._unfinished.clear()
            raise
        now = time.monotonic_ns()
        entries = self._ring[self._next % len(self._ring)]
        events = [
            TokenEvent(self._next, row, int(entries[row, 1]), bool(entries[row, 2] & 1), now)
            for row in sorted(self._unfinished)
        ]
        self._next += 1
        self._unfinished.difference_update(event.row for event in events if event.finished)
        if self._stopped or self._next == self._end or len(self._unfinished) <= self._stop_at:
            self._unfinished.clear()
        return events, not self._unfinished

    def stop(self) -> None:
        """See DecodeLoop."""
        self._stopped = True

    def wake(self) -> None:
        """Nothing blocks."""

    def close(self) -> None:
        """See DecodeLoop."""
        self._unfinished.clear()
