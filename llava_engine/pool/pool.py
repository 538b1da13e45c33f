"""WorkerPool: the pool's surface and admission; `vision_pool()` is the process's own.

What locks there are, and what may be called under them, stands in pool.state.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from llava_engine.channel import Channel, other_process
from llava_engine.config import PoolConfig
from llava_engine.errors import (
    LlavaError,
    NoWorkers,
    PoolError,
    PoolOverloaded,
)
from llava_engine.image.load import check_image
from llava_engine.image.url import check_url
from llava_engine.pool import maintenance
from llava_engine.pool.breaker import BreakerState
from llava_engine.pool.life import Life
from llava_engine.pool.metrics import Metrics
from llava_engine.pool.model import ModelSpec
from llava_engine.pool.request import Request
from llava_engine.pool.sizing import MemoryProbe, Need, SystemProbe
from llava_engine.pool.spawn import Spawn
from llava_engine.pool.state import PoolState, shutting_down
from llava_engine.pool.worker import Loader
from llava_engine.stream import ChunkStream
from llava_engine.text.prompt import check_query
from llava_engine.types import ImageInput, SamplingParams, plain_float

_COLD_START = 2  # workers
_JOIN_S = 3.0  # for threads to end after the last request has
_EXIT_DRAIN_S = 1.0


class WorkerPool:
    """Workers of any number of models, and the memory they share. All methods are thread-safe.

    A context manager: leaving it is `shutdown`. A pool that was used and is dropped without that
    keeps its threads and its models' memory until the interpreter exits.

    probe: where memory figures come from. clock: monotonic seconds, for timeouts of workers and
    breakers (requests' deadlines are in `time.monotonic()` always).
    """

    def __init__(
        self,
        config: PoolConfig | None = None,
        *,
        probe: MemoryProbe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = PoolConfig.from_env() if config is None else _checked(config)
        self._state = PoolState(config, probe if probe is not None else SystemProbe(), clock)
        self._life = Life(self._state)
        self._maintenance: threading.Thread | None = None

    @property
    def config(self) -> PoolConfig:
        """The limits."""
        return self._state.config

    def add_model(self, spec: ModelSpec) -> None:
        """Make a model known, so that its first request can spawn workers; the first spec of a
        key stays."""
        self._check_process()
        with self._state.lock:
            self._state.add_model(spec)

    def has_workers(self, registry_key: str) -> bool:
        """Whether the model has a worker that takes requests."""
        self._check_process()
        with self._state.lock:
            model = self._state.models.get(registry_key)
            return model is not None and bool(model.live_workers)

    def spawn_vision_worker(
        self, registry_key: str, loader: Loader, per_worker_mb: int
    ) -> Future[None]:
        """Spawn one more worker of a model, for which `per_worker_mb` of memory is reserved.

        Does not wait. The future is done when the worker takes requests; it holds MemoryExhausted
        when nothing fits, SpawnFailed when loading fails, ShuttingDown, or PoolError while another
        spawn of the model is under way. What was given for a key first stays.
        """
        self._check_process()
        if per_worker_mb <= 0:
            raise ValueError(f"per_worker_mb must be above 0, not {per_worker_mb}")
        need = Need(per_worker_mb, per_worker_mb)
        spec = ModelSpec(
            registry_key, loader, lambda device: need, lambda gpus, host: gpus or [host]
        )
        with self._state.lock:
            closing = self._state.closing
            model = self._state.add_model(spec)
            spawn = None if closing else self._life.begin_spawn(model, 1)
        if spawn is not None:
            self._start(spawn)
            return spawn.done
        refused: Future[None] = Future()
        refused.set_exception(
            shutting_down()
            if closing
            else PoolError(f"A worker for {registry_key} is being spawned already.")
        )
        return refused

    def total_memory_mb(self) -> int:
        """MiB that workers hold or have reserved on the devices they run on."""
        self._check_process()
        with self._state.lock:
            return self._state.ledger.total_mb()

    def describe_image(
        self,
        registry_key: str,
        image: ImageInput,
        query: str,
        *,
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ChunkStream:
        """Ask a model about a picture; see VisionModel.describe_image.

        Raises TypeError or ValueError for arguments; all else comes through the stream, NoWorkers
        if the model is not known to this pool.
        """
        check_image(image)
        return self._describe(
            registry_key, query, sampling, timeout, priority, cache_salt, image=image
        )

    def describe_url(
        self,
        registry_key: str,
        url: str,
        query: str,
        *,
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ChunkStream:
        """`describe_image` for the picture that a URL leads to."""
        check_url(url)
        return self._describe(registry_key, query, sampling, timeout, priority, cache_salt, url=url)

    def health(self) -> dict[str, Any]:
        """A JSON-able record: per model its state, workers, queue depth, latencies and what the
        stages of its last cold start took, in seconds; per device the memory in MiB. Devices appear
        once a worker was spawned. A worker's "blocked" counts threads that requests which have
        ended still hold, by file objects whose read() does not return."""
        self._check_process()
        state = self._state
        memory = [*state.probe.gpus(), state.probe.host()] if state.probed else []
        with state.lock:
            state.settle()
            held = state.ledger.held()
            total = state.ledger.total_mb()
            models = {key: model.health() for key, model in state.models.items()}
            closing = state.closing
        return {
            "status": "closing" if closing else "ok",
            "total_memory_mb": total,
            "devices": {
                device.name: {
                    "used_mb": held[device.name].total_mb if device.name in held else 0,
                    "limit_mb": int(device.total_mb * self.config.memory_fraction),
                    "free_mb": device.free_mb,
                    "total_mb": device.total_mb,
                    "lost": device.name in state.lost,
                }
                for device in memory
            },
            "models": models,
        }

    def attach_metrics(self, registry: Any = None) -> None:
        """Publish counters, histograms and gauges through prometheus_client (the `metrics` extra).

        registry: a CollectorRegistry; the process's default one if None. A registry takes one pool,
        once: further pools need their own. Raises PoolError where it has one already, and where
        prometheus_client is not installed.
        """
        self._check_process()
        metrics = Metrics(self.health, registry)
        with self._state.lock:
            self._state.metrics.append(metrics)

    def shutdown(self, drain_s: float | None = None) -> None:
        """Refuse new requests, let running ones end for up to `drain_s` seconds, end the rest with
        ShuttingDown, free all memory and join every thread. Idempotent.

        drain_s: PoolConfig.drain if None. A thread that hangs in foreign code is not waited for.
        """
        if drain_s is not None and not plain_float("drain_s", drain_s) >= 0:
            raise ValueError(f"drain_s must be 0 or more, not {drain_s}")
        state = self._state
        if os.getpid() != state.pid:
            return
        with state.lock:
            state.closing = True
            state.changed.notify_all()
            patience = self.config.drain if drain_s is None else drain_s
            state.changed.wait_for(state.drained, min(patience, threading.TIMEOUT_MAX))
            rest = [request for model in state.models.values() for request in model.live]
        for request in rest:
            request.channel.abort(shutting_down())
        with state.lock:
            workers = [worker for model in state.models.values() for worker in model.workers]
            threads = state.threads
            metrics, state.metrics = state.metrics, []
        for worker in workers:
            worker.abandon()
            worker.stop()
        until = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        with state.lock:
            state.settle()
            state.stopped = True
            maintaining = self._maintenance
        state.ended.put(None)
        if maintaining is not None:
            maintaining.join(max(0.0, until - time.monotonic()))
        for published in metrics:
            published.close()
        _running_pools.discard(self)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def maintain(self) -> None:
        """One round of what the maintenance thread does; see pool.maintenance."""
        maintenance.tick(self._state, self._life)

    def _describe(
        self,
        registry_key: str,
        query: str,
        sampling: SamplingParams | None,
        timeout: float | None,
        priority: int,
        cache_salt: str,
        *,
        image: ImageInput | None = None,
        url: str | None = None,
    ) -> ChunkStream:
        if not isinstance(registry_key, str):
            raise TypeError(f"registry_key must be a str, not {type(registry_key).__name__}")
        check_query(query)
        _check_options(timeout, priority, cache_salt)
        if sampling is None:
            sampling = SamplingParams()
        elif not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling must be a SamplingParams, not {type(sampling).__name__}")
        if timeout is None:
            timeout = self.config.default_timeout
        deadline = None
        if timeout is not None and timeout <= threading.TIMEOUT_MAX:  # no lock waits for longer
            deadline = time.monotonic() + float(timeout)
        request: Request
        ended, fetches = self._state.ended, self._state.fetches
        channel = Channel(sampling.stop, deadline, on_end=lambda _: ended.put(request))
        request = Request(
            registry_key, query, sampling, channel, fetches, image, url, priority, cache_salt
        )
        stream = ChunkStream(channel)
        error = self._admit(request)
        if error is not None:
            channel.fail(error)
        return stream

    def _admit(self, request: Request) -> LlavaError | None:
        """Queue the request with a worker or for a spawn; or say why not."""
        state, key = self._state, request.registry_key
        if os.getpid() != state.pid:
            return other_process("pool")
        spawn = None
        with state.lock:
            state.settle()
            if state.closing:
                return shutting_down()
            model = state.models.get(key)
            if model is None:
                return NoWorkers(f"This pool has no workers for {key} and cannot spawn any.")
            wait = model.breaker.retry_after()
            if not wait and model.breaker.state is BreakerState.HALF_OPEN:
                # No more trials at once than it takes to close the circuit. Paused ones are none:
                # nobody knows when their readers will come.
                trials = len(model.live) - model.paused
                wait = 1.0 if trials >= self.config.breaker_successes else 0.0
            if wait:
                return model.circuit_open(wait)
            paused = model.paused
            if model.queue_depth + paused >= self.config.max_queue:
                readers = f", {paused} of them for their readers" if paused else ""
                return PoolOverloaded(
                    f"{self.config.max_queue} requests for {key} are waiting{readers}.",
                    model.retry_after(),
                )
            model.live[request] = None
            model.used_at = state.clock()
            if not state.assign(model, request):
                spawn = self._life.begin_spawn(model, _COLD_START)
        if spawn is not None:
            self._start(spawn)
        return None

    def _start(self, spawn: Spawn) -> None:
        with self._state.lock:
            if self._maintenance is None and not self._state.closing:
                self._maintenance = maintenance.start(self._state, self._life)
                _running_pools.add(self)
        spawn.start()

    def _check_process(self) -> None:
        if os.getpid() != self._state.pid:
            raise other_process("pool")


def _checked(config: object) -> PoolConfig:
    if not isinstance(config, PoolConfig):
        raise TypeError(f"config must be a PoolConfig, not {type(config).__name__}")
    return config


def _check_options(timeout: object, priority: object, cache_salt: object) -> None:
    if timeout is not None and not plain_float("timeout", timeout) > 0:
        raise ValueError(f"timeout must be above 0, not {timeout}")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be an int, not {type(priority).__name__}")
    if not isinstance(cache_salt, str):
        raise TypeError(f"cache_salt must be a str, not {type(cache_salt).__name__}")


_running_pools: set[WorkerPool] = set()
"""Those that have threads, which must end before the interpreter does."""

_own_lock = threading.Lock()
_own: WorkerPool | None = None


def vision_pool(config: PoolConfig | None = None) -> WorkerPool:
    """The process's pool, made when first asked for, with `config` or PoolConfig.from_env().

    It stays the same one: after its shutdown it refuses requests. Raises ValueError when `config`
    is not the one it was made with.
    """
    global _own
    with _own_lock:
        if _own is None:
            _own = WorkerPool(config)
        pool = _own
    if config is not None and _checked(config) != pool.config:
        raise ValueError("the process's pool is there already, with another configuration")
    return pool


def _at_exit() -> None:
    for pool in list(_running_pools):
        pool.shutdown(min(pool.config.drain, _EXIT_DRAIN_S))


def _after_fork_in_child() -> None:
    global _own_lock
    _own_lock = threading.Lock()  # some thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
# Before the interpreter waits for the user's own threads, which may be reading streams; atexit
# itself would run after them, and so might wait for ever.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
