"""A progress bar for a terminal, so that a long load does not look like a hang."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

DELAY_S = 1.0
"""What takes less is not worth a bar."""

_INTERVAL_S = 0.1
_WIDTH = 24
_WIPE = "\r\x1b[K"


class ProgressBar:
    """Shows on a terminal how far something is that has taken DELAY_S already.

    title: what is loaded. stream: sys.stderr as it is now, if None; one that is no terminal is left
    alone. All methods are thread-safe, and what goes wrong with a terminal is nobody's business.
    """

    def __init__(
        self,
        title: str,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._next = clock() + DELAY_S
        self._enabled = _is_terminal(self._stream)
        self._drawn = False
        self._lock = threading.Lock()

    def update(self, done: int, total: int) -> None:
        """So many bytes of so many are done."""
        with self._lock:
            now = self._clock()
            if not self._enabled or now < self._next:
                return
            self._next = now + _INTERVAL_S
            share = min(1.0, done / total) if total > 0 else 0.0
            full = round(share * _WIDTH)
            bar = f"Loading {self._title:.24} [{'#' * full}{' ' * (_WIDTH - full)}] {share:4.0%}"
            line = f"{bar}  {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
            self._drawn = self._enabled = self._write(_WIPE + line)

    def close(self) -> None:
        """Wipe the bar away; nothing is drawn any more."""
        with self._lock:
            self._enabled = False
            if self._drawn:
                self._write(_WIPE)
                self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, text: str) -> bool:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has gone, or the stream was closed
            return False
        return True


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()  # a process may have no stderr
    except (OSError, ValueError):
        return False
