"""What decodes a run of steps: the protocol, and `EagerLoop`, which runs a step in each `wait`.

A run is a number of decoding steps for the first rows of a DecodeState, which the caller has
filled. Knows rows and ring entries only; whose rows they are is the runtime's. The other
implementation, `native_loop.NativeLoop`, launches captured steps ahead and needs no GIL for it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


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
        ring's length, and none is started once `stop` was called or at most `stop_at` rows are
        unfinished. Raises DeviceFailed, and ValueError while a run is on.
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
