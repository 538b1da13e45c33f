"""What the parts of one pool share: its models, the memory they hold, and the locks.

Two locks: `planning` is held by the one spawn that measures memory and reserves it; `lock`, taken
after it where both are, guards all other state and is held for microseconds. No channel, loader or
engine is called under `lock`. What ends a stream may run inside a garbage collection, so a
stream's end only puts its request on `ended`, which needs no lock.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from llava_engine.config import PoolConfig
from llava_engine.errors import ShuttingDown
from llava_engine.image.budget import ByteBudget
from llava_engine.pool.breaker import CircuitBreaker
from llava_engine.pool.metrics import Metrics, stages
from llava_engine.pool.model import Model, ModelSpec
from llava_engine.pool.request import Request, copy_of
from llava_engine.pool.sizing import Ledger, MemoryProbe
from llava_engine.pool.worker import WorkerState

logger = logging.getLogger(__name__)


class PoolState:
    """See the module; methods say whether the caller must hold `lock`.

    fetches: the memory that all downloads share.
    ended: requests whose streams have ended; None wakes the maintenance thread.
    closing: nothing new is taken; stopped: nothing is left to look after.
    lost: names of devices that have failed: nothing is put on them any more.
    changed: notified when a request, a spawn or a worker has come to its end.
    """

    def __init__(self, config: PoolConfig, probe: MemoryProbe, clock: Callable[[], float]) -> None:
        self.config = config
        self.probe = probe
        self.clock = clock
        self.pid = os.getpid()
        self.fetches = ByteBudget(config.max_fetch_bytes)
        self.planning = threading.Lock()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.models: dict[str, Model] = {}
        self.ledger = Ledger()
        self.ended: SimpleQueue[Request | None] = SimpleQueue()
        self.metrics: list[Metrics] = []
        self.threads: set[threading.Thread] = set()
        self.lost: set[str] = set()
        self.probed = False
        self.closing = False
        self.stopped = False
        self._chance = random.Random()

    @property
    def ending(self) -> bool:
        """Whether the pool is closing, or the interpreter, which refuses threads and exit handlers
        before it lets the pool close. Whatever fails then fails for that."""
        return self.closing or getattr(threading, "_SHUTTING_DOWN", False)

    def start_thread(self, name: str, target: Callable[[], None]) -> None:
        """Start a thread that shutdown will join, unless the pool is closing: then ShuttingDown.

        Raises RuntimeError where no thread can be had. Under the lock, so that shutdown sees the
        thread either running or not at all.
        """
        if self.closing:
            raise shutting_down()
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self.threads = {thread, *(old for old in self.threads if old.is_alive())}

    def add_model(self, spec: ModelSpec) -> Model:
        """The model of the spec's key; the first spec stays. Under the lock."""
        model = self.models.get(spec.registry_key)
        if model is None:
            breaker = CircuitBreaker(
                failures=self.config.breaker_failures,
                reset=self.config.breaker_reset,
                successes=self.config.breaker_successes,
                clock=self.clock,
            )
            model = self.models[spec.registry_key] = Model(spec, breaker)
        return model

    def assign(self, model: Model, request: Request) -> bool:
        """Hand the request to a worker; False if the model has none. Under the lock."""
        worker = model.pick(self._chance)
        if worker is None:
            return False
        request.worker = worker
        worker.active += 1
        if worker.state is not WorkerState.PROCESSING:
            worker.become(WorkerState.PROCESSING)
        worker.put(request)
        return True

    def settle(self) -> None:
        """Take note of every request that has ended. Under the lock."""
        while True:
            try:
                request = self.ended.get_nowait()
            except Empty:
                return
            self.settle_one(request)

    def settle_one(self, request: Request | None) -> None:
        """Take note of one request that has ended. Under the lock."""
        model = self.models.get(request.registry_key) if request is not None else None
        if request is None or model is None:
            return
        times = stages(request.channel)
        model.outcomes[request.outcome] += 1
        for metrics in self.metrics:
            try:
                metrics.observe(request, times)
            except Exception:  # prometheus_client may write files; no request is to hang for that
                logger.exception("Metrics failed; a request is not counted.")
        if request not in model.live:
            return  # it was refused
        del model.live[request]
        request.image = None
        worker, request.worker = request.worker, None
        model.used_at = self.clock()
        if worker is not None:
            worker.active -= 1
            if not worker.active and worker.state is WorkerState.PROCESSING:
                worker.become(WorkerState.READY)
                worker.idle_since = self.clock()
        if request.succeeded:
            model.breaker.success()
            model.setbacks = 0
            model.latencies.append(times)
        elif request.model_failed and request.channel.error is not None:
            model.breaker.failure(copy_of(request.channel.error))
        if not model.live:
            self.changed.notify_all()

    def drained(self) -> bool:
        """Whether no request is left. Under the lock."""
        self.settle()
        return not any(model.live for model in self.models.values())


def shutting_down(cause: BaseException | None = None) -> ShuttingDown:
    """A new error for one stream."""
    error = ShuttingDown("The pool is shut down.")
    error.__cause__ = cause
    return error
