"""What the pool knows of one model: how to load it, its workers, its requests, how it fares.

Plain records, guarded by the pool's lock. Nothing here starts a thread or calls out.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from llava_engine.errors import CircuitOpen, RequestError
from llava_engine.pool.breaker import CircuitBreaker
from llava_engine.pool.request import Request, in_short
from llava_engine.pool.sizing import DeviceMemory, Need
from llava_engine.pool.stages import Stages
from llava_engine.pool.worker import LIVE, Backend, Loader, Worker, WorkerState

_KEPT = 256  # latencies


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """How the pool can bring up workers of a model.

    loader: loads it onto a device. need: what its workers take on a device of that name. devices:
    where it may run, given the GPUs and the host. warm_up: what a cold start can do before it knows
    the device, and hold until it is over. stages: where it is told how long they take. smaller: as
    `need`, for each format in which it would take less. All are called on threads of the pool.
    """

    registry_key: str
    loader: Loader
    need: Callable[[str], Need]
    devices: Callable[[list[DeviceMemory], DeviceMemory], list[DeviceMemory]]
    warm_up: Callable[[], AbstractContextManager[None]] = nullcontext
    stages: Stages = field(default_factory=Stages)
    smaller: Callable[[str], dict[str, Need]] = lambda device: {}


@dataclass(eq=False, slots=True)
class Site:
    """A model on one device, and the workers that share it there.

    dead: the backend has died; nobody is to join it.
    """

    device: str
    backend: Backend
    host_mb: int
    workers: set[Worker] = field(default_factory=set)
    dead: bool = False

    def fail(self, cause: BaseException) -> None:
        """The backend died, and its workers with it. Takes no lock."""
        self.dead = True
        for worker in list(self.workers):
            worker.fail(cause)


@dataclass(eq=False, slots=True)
class Model:
    """A model's state in the pool.

    live: every request that has not ended, in order of arrival.
    workers: all that have a thread, those being spawned and evicted included.
    spawning: whether a spawn is under way; there is at most one.
    target: workers it should have: what it had before any died.
    setbacks: deaths of workers and failed spawns in a row.
    spawn_after: not before then does the pool spawn unasked; a request without a worker may.
    """

    spec: ModelSpec
    breaker: CircuitBreaker
    live: dict[Request, None] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    spawning: bool = False
    target: int = 0
    setbacks: int = 0
    spawn_after: float = 0.0
    used_at: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))

    @property
    def live_workers(self) -> list[Worker]:
        """Workers that take requests."""
        return [worker for worker in self.workers if worker.state in LIVE]

    @property
    def queue_depth(self) -> int:
        """Requests that no batch has admitted yet."""
        return sum(request.waiting for request in self.live)

    @property
    def paused(self) -> int:
        """Requests whose readers are too far behind. They count for admission: each holds its
        picture in host memory, and those that are never read would be without bound."""
        return sum(request.paused for request in self.live)

    @property
    def running(self) -> int:
        """Requests of a batch, or on their way into it again."""
        return len(self.live) - self.queue_depth - self.paused

    @property
    def state(self) -> str:
        """The model in a word: its best worker's state, "spawning", or "cold"."""
        live = {worker.state for worker in self.live_workers}
        for state in (WorkerState.PROCESSING, WorkerState.READY, WorkerState.IDLE):
            if state in live:
                return str(state)
        return "spawning" if self.spawning else "cold"

    @property
    def idle(self) -> bool:
        """Whether its workers could go without anybody missing them now."""
        return not self.live and not self.spawning and bool(self.live_workers)

    def evict(self, worker: Worker) -> None:
        """Send an idle worker away."""
        worker.become(WorkerState.EVICTING)
        worker.stop()
        self.target = len(self.live_workers)

    def pick(self, chance: random.Random) -> Worker | None:
        """The less loaded of two random live workers (Mitzenmacher 2001); None without any."""
        live = self.live_workers
        if not live:
            return None
        return min(chance.sample(live, min(2, len(live))), key=lambda worker: worker.active)

    def free_number(self) -> int:
        """The lowest number from 1 that no worker has."""
        taken = {worker.number for worker in self.workers}
        return next(number for number in range(1, len(taken) + 2) if number not in taken)

    def retry_after(self) -> float:
        """Seconds in which a place in the queue is likely to come free: one latency's share."""
        totals = sorted(times["total"] for times in self.latencies if "total" in times)
        median = totals[len(totals) // 2] if totals else 1.0
        return min(60.0, max(0.1, median / max(1, self.running)))

    def circuit_open(self, wait: float) -> CircuitOpen:
        """A new error for one stream, `wait` seconds before the model is tried again.

        It says what the model failed with, and is as little retryable; but what failed one request
        alone need not fail this one.
        """
        cause, key = self.breaker.cause, self.spec.registry_key
        said = f" ({in_short(cause)})" if cause is not None else ""
        error = CircuitOpen(f"{key} failed too often{said}; tried again in {wait:.0f} s.", wait)
        error.__cause__ = cause
        if cause is not None and not isinstance(cause, RequestError):
            error.retryable = cause.retryable
        return error

    def health(self) -> dict[str, Any]:
        """A JSON-able record; latencies in seconds."""
        return {
            "state": self.state,
            "breaker": str(self.breaker.state),
            "workers": [
                {
                    "name": worker.name,
                    "state": str(worker.state),
                    "device": worker.device,
                    "requests": worker.active,
                    "blocked": worker.blocked,
                }
                for worker in self.workers
            ],
            "cold_start": self.spec.stages.seconds(),
            "queue_depth": self.queue_depth,
            "paused": self.paused,
            "running": self.running,
            "outcomes": dict(self.outcomes),
            "latency": {
                stage: _percentiles([t[stage] for t in self.latencies if stage in t])
                for stage in ("queued", "image", "first_token", "inter_token", "total")
            },
        }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    values.sort()
    return {f"p{q}": values[min(len(values) - 1, len(values) * q // 100)] for q in (50, 95)}
