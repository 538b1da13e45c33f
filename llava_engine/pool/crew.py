"""A few daemon threads that take jobs from one queue.

concurrent.futures is not used, since its threads are joined at interpreter exit, however long a
job takes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_MOST_REPLACED = 8  # times the crew's size; what blocks beyond that holds up others


class _Job:
    """over: whether nobody waits for it any more. late: how many calls of `relieve` found it so."""

    __slots__ = ("late", "over", "run")

    def __init__(self, run: Callable[[], None], over: Callable[[], bool]) -> None:
        self.run = run
        self.over = over
        self.late = 0

    @property
    def blocks(self) -> bool:
        """Whether it was over for a while and has not returned."""
        return self.late > 1


class Crew:
    """Up to `size` threads, each started when a job finds all others busy; and while jobs that are
    over do not return, another thread for each of those, up to `_MOST_REPLACED` times `size`.

    Jobs must not raise. All methods are thread-safe; `over` is called under the crew's lock.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._threads: set[threading.Thread] = set()
        self._started = 0
        self._stopped = False

    def put(self, job: Callable[[], None], over: Callable[[], bool]) -> None:
        """Do `job` as soon as a thread is free. `over` says whether nobody waits for it any more.

        Raises RuntimeError where not even a first thread can be had.
        """
        with self._changed:
            self._waiting.append(_Job(job, over))
            self._staff()
            self._changed.notify()

    def relieve(self) -> int:
        """Start threads in place of those whose jobs were over at the last call already; how many
        those are. To be called now and then."""
        with self._changed:
            for job in self._running:
                job.late += job.over()
            self._staff()
            return self._blocked()

    @property
    def blocked(self) -> int:
        """Threads whose jobs block: over for a while, and not back."""
        with self._changed:
            return self._blocked()

    def stop(self) -> None:
        """Let every thread end after its job; jobs not begun are left."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, until: float) -> None:
        """Wait for the threads, until `time.monotonic()` says `until`."""
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _blocked(self) -> int:
        return sum(job.blocks for job in self._running)

    def _limit(self) -> int:
        return self._size + min(self._blocked(), _MOST_REPLACED * self._size)

    def _staff(self) -> None:
        """Start the threads that waiting jobs need. Under the lock."""
        while not self._stopped:
            free = len(self._threads) - len(self._running)
            if len(self._waiting) <= free or len(self._threads) >= self._limit():
                return
            thread = threading.Thread(
                target=self._work, name=f"{self._name}-{self._started}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the process has no thread left; those there are go on
                if not self._threads:
                    raise
                return
            self._started += 1
            self._threads.add(thread)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            with self._changed:
                self._running.discard(job)
            del job  # or the last request's picture would stay until the next one comes

    def _next(self) -> _Job | None:
        """Wait for a job; None when the thread is to end."""
        with self._changed:
            while not self._stopped and len(self._threads) <= self._limit():
                if self._waiting:
                    job = self._waiting.popleft()
                    self._running.add(job)
                    return job
                self._changed.wait()
            if not self._stopped:  # or `join` would not wait for it
                self._threads.discard(threading.current_thread())
            return None
