"""The memory that the downloads of a pool share, whatever models they are for."""

from __future__ import annotations

import threading

from llava_engine.errors import FetchTimeout


class ByteBudget:
    """`total` bytes that are shared out to the fetches in flight; thread-safe."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    def take(self, size: int, timeout: float) -> int:
        """Wait until `size` bytes are free, and take them; returns what is to be given back.

        More than there are in all is taken as all: such a fetch runs alone. Raises FetchTimeout
        after `timeout` seconds.
        """
        size = min(size, self._total)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= size, timeout):
                raise FetchTimeout("other fetches hold the memory for pictures")
            self._free -= size
        return size

    def give(self, size: int) -> None:
        """Give back what `take` returned."""
        with self._changed:
            self._free += size
            self._changed.notify_all()
