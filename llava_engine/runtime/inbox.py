"""What a runtime's loop thread is asked to do, by any other thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from llava_engine.runtime.sequence import Sequence

Item = Sequence | Callable[[], None] | None
"""A sequence to run, a command to call between steps, or None: just look around."""


class Inbox:
    """Items in their order. Any thread may `put`; the loop thread takes them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._seen: deque[Item] = deque()

    def __len__(self) -> int:
        return self._queue.qsize() + len(self._seen)

    def put(self, item: Item) -> None:
        """Add an item. Takes no lock."""
        self._queue.put(item)

    def has_news(self) -> bool:
        """Whether there is an item that `sequences` has not seen."""
        return not self._queue.empty()

    def sequences(self) -> list[Sequence]:
        """All that are here, which stay here."""
        while not self._queue.empty():
            self._seen.append(self._queue.get_nowait())  # nobody else takes any
        return [item for item in self._seen if isinstance(item, Sequence)]

    def take(self, wait: bool, timeout: float | None = None) -> Iterator[Item]:
        """Every item, until there is none; for the first one wait, at most `timeout` seconds."""
        try:
            yield self._seen.popleft() if self._seen else self._queue.get(wait, timeout)
            while True:
                yield self._seen.popleft() if self._seen else self._queue.get_nowait()
        except Empty:
            return
