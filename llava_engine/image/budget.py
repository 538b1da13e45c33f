"""The memory that the downloads of a pool share, whatever models they are for."""

from __future__ import annotations

import threading
from typing import Self

from llava_engine.errors import FetchTimeout


class ByteBudget:
    """`total` bytes that are shared out to fetches and to what they brought; thread-safe."""

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


class Body(bytes):
    """What was downloaded, which keeps its place in a budget until `let_go`, or until it is gone.

    Else bodies that wait for a decoder would be without bound: fetching is quicker than decoding.
    """

    _budget: ByteBudget
    _held = 0

    def __new__(cls, data: bytes | bytearray, budget: ByteBudget, held: int) -> Self:
        """`held` bytes were taken from `budget` for it."""
        body = super().__new__(cls, data)
        body._budget, body._held = budget, held
        return body

    def let_go(self) -> None:
        """Give its place back; once."""
        held, self._held = self._held, 0
        if held:
            self._budget.give(held)

    __del__ = let_go
