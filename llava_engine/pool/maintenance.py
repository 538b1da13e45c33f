"""What happens without a request asking for it: idling, eviction, replacement, growth, deadlines,
threads that are blocked.

`tick` is one round, at whatever time the pool's clock says; the thread only calls it.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import Empty

from llava_engine.pool.life import Life
from llava_engine.pool.model import Model
from llava_engine.pool.spawn import Spawn
from llava_engine.pool.state import PoolState
from llava_engine.pool.worker import Worker, WorkerState

logger = logging.getLogger(__name__)

_INTERVAL = 0.5  # seconds between rounds; a request's end is noted at once


def start(state: PoolState, life: Life) -> threading.Thread:
    """The thread; it ends once the pool is closing and `state.ended` wakes it."""
    thread = threading.Thread(
        target=_run, args=(state, life), name="llava-maintenance", daemon=True
    )
    thread.start()
    return thread


def _run(state: PoolState, life: Life) -> None:
    due = 0.0
    while True:
        try:
            request = state.ended.get(timeout=max(0.0, due - time.monotonic()))
        except Empty:
            request = None
        with state.lock:
            state.settle_one(request)
            state.settle()
            if state.stopped:
                return
        del request
        if time.monotonic() >= due:
            due = time.monotonic() + _INTERVAL
            try:
                tick(state, life)
            except Exception:
                logger.exception("Maintenance failed; it goes on.")


def tick(state: PoolState, life: Life) -> None:
    """One round over all models."""
    spawns: list[Spawn | None] = []
    workers: list[Worker] = []
    with state.lock:
        state.settle()
        now = time.monotonic()
        overdue = [
            request.channel
            for model in state.models.values()
            for request in model.live
            if request.channel.deadline is not None and request.channel.deadline <= now
        ]
        if not state.closing:
            for model in state.models.values():
                _evict_idle(state, model)
                spawns.append(_respawn(state, life, model))
                workers += model.live_workers
    for channel in overdue:
        channel.expire()
    for spawn in spawns:
        if spawn is not None:
            spawn.start()
    for worker in workers:
        worker.relieve()


def _evict_idle(state: PoolState, model: Model) -> None:
    """Ready workers without work go Idle after the timeout; those idle before are evicted."""
    live = model.live_workers
    if model.spawning:
        return
    for worker in live:
        if worker.state is WorkerState.IDLE and len(model.live_workers) > state.config.min_workers:
            logger.info("Evicting idle worker %d for %s", worker.number, model.spec.registry_key)
            model.evict(worker)
        elif (
            worker.state is WorkerState.READY
            and state.clock() - worker.idle_since >= state.config.idle_timeout
        ):
            worker.become(WorkerState.IDLE)


def _respawn(state: PoolState, life: Life, model: Model) -> Spawn | None:
    """A spawn where workers died, or where all are busy and requests wait for more."""
    live = model.live_workers
    if model.spawning or state.clock() < model.spawn_after or model.breaker.retry_after():
        return None
    if len(live) < model.target:
        return life.begin_spawn(model, 1)
    busy = bool(live) and all(worker.state is WorkerState.PROCESSING for worker in live)
    if busy and model.queue_depth and len(live) < state.config.max_workers:
        return life.begin_spawn(model, 1, evict=False)
    return None
