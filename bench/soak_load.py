"""Who asks in bench/soak.py: threads and an event loop, and the count of what became of it all."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter

from bench.soak_requests import Kind, run, run_async

THREADS, TASKS = 6, 6
LEAK_BYTES = 47  # of an object that is kept; it takes twice as much


class Load:
    """The requests in flight, and what became of all others. Thread-safe.

    leak: MB an hour that are kept, in small objects.
    """

    def __init__(self, kinds: list[Kind], leak: float = 0.0) -> None:
        self.kinds = {kind.name: kind for kind in kinds}
        self.outcomes: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
        self.stopping = False
        self._leak = leak
        self._leaked: list[bytes] = []
        self._began = time.monotonic()
        self._paused = False
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._deck: list[str] = []

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(counts.total() for counts in self.outcomes.values())

    def begin(self, chance: random.Random) -> Kind | None:
        """A kind to ask now, each as often as any other; None while asking is paused."""
        with self._lock:
            if self._paused:
                return None
            if not self._deck:
                self._deck = chance.sample(list(self.kinds), len(self.kinds))
            name = self._deck.pop()
            self._running[name] += 1
            return self.kinds[name]

    def end(self, kind: Kind, outcome: str) -> None:
        """A request that `begin` gave has ended so."""
        with self._lock:
            self._running[kind.name] -= 1
            self.outcomes[kind.name][outcome] += 1
            due = self._leak * 1e6 / 3600 * (time.monotonic() - self._began)
            while len(self._leaked) * 2 * LEAK_BYTES < due:
                self._leaked.append(os.urandom(LEAK_BYTES))

    def pause(self, timeout: float) -> list[str]:
        """Begin nothing more and wait for the rest; returns the kinds that did not end in time."""
        self._paused = True
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            with self._lock:
                left = [name for name, count in self._running.items() if count]
            if not left:
                return []
            time.sleep(0.01)
        return left

    def resume(self) -> None:
        """Go on asking."""
        self._paused = False

    def unexpected(self) -> list[str]:
        """A line for each outcome that is not right for its kind."""
        return [
            f"{name}: {outcome} ({count} times)"
            for name, counts in self.outcomes.items()
            for outcome, count in counts.items()
            if outcome not in self.kinds[name].expected
        ]

    def ask(self, seed: int) -> None:
        """A thread: one request after the other."""
        chance = random.Random(seed)
        while not self.stopping:
            kind = self.begin(chance)
            if kind is None:
                time.sleep(0.01)
            else:
                self.end(kind, run(kind, chance))

    async def _ask_async(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopping:
            kind = self.begin(chance)
            if kind is None:
                await asyncio.sleep(0.01)
            else:
                self.end(kind, await run_async(kind, chance))

    async def _tasks(self) -> None:
        await asyncio.gather(*(self._ask_async(1_000 + index) for index in range(TASKS)))

    def start(self) -> list[threading.Thread]:
        """All that ask; they end soon after `stopping`."""
        threads = [
            threading.Thread(target=self.ask, args=(index,), daemon=True)
            for index in range(THREADS)
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._tasks()), daemon=True))
        for thread in threads:
            thread.start()
        return threads
