"""A few daemon threads that take jobs from one queue.

concurrent.futures is not used, since its threads are joined at interpreter exit, however long a
job takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue


class Crew:
    """Up to `size` threads, each started when a job finds all others busy.

    Jobs must not raise. `put` is for one thread only, the crew's owner.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def put(self, job: Callable[[], None]) -> None:
        """Do `job` as soon as a thread is free."""
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
            thread = threading.Thread(
                target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._jobs.put(job)

    def stop(self) -> None:
        """Let every thread end after its job; jobs not begun are left."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, until: float) -> None:
        """Wait for the threads, until `time.monotonic()` says `until`."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or the last request's picture would stay until the next one comes
            self._idle.release()
