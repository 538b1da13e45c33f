"""One spawn: find room, reserve it, start workers there and wait until they have loaded.

Runs on a thread of its own, so that no caller waits for a measurement or a load.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from llava_engine.errors import (
    DeviceLost,
    LlavaError,
    MemoryExhausted,
    ModelError,
    PoolError,
    ShuttingDown,
    SpawnFailed,
)
from llava_engine.pool.model import Model
from llava_engine.pool.request import copy_of, in_short
from llava_engine.pool.sizing import DeviceMemory, Placement, plan_workers
from llava_engine.pool.state import PoolState, shutting_down
from llava_engine.pool.worker import Worker, WorkerState

if TYPE_CHECKING:
    from llava_engine.pool.life import Life

logger = logging.getLogger(__name__)

_LEAVING_S = 30.0  # for evicted workers to free their memory


class Spawn:
    """Up to `wanted` workers of a model, at least one or an error.

    done: when the workers take requests; holds the LlavaError if there are none.
    """

    def __init__(
        self, state: PoolState, life: Life, model: Model, wanted: int, *, evict: bool
    ) -> None:
        self.done: Future[None] = Future()
        self._state = state
        self._life = life
        self._model = model
        self._key = model.spec.registry_key
        self._wanted = wanted
        self._evict = evict

    def start(self) -> None:
        """Begin; not under the pool's lock."""
        try:
            with self._state.lock:
                self._state.start_thread(f"llava-spawn-{self._key}", self._run)
        except (RuntimeError, ShuttingDown) as error:
            self._end(self._failed(error))

    def _run(self) -> None:
        error: LlavaError | None = None
        try:
            self._spawn()
        except (ModelError, PoolError) as raised:
            error = raised
        except BaseException as raised:  # noqa: BLE001  or every waiting stream would hang
            error = self._failed(raised)
        self._end(error)

    def _end(self, error: LlavaError | None) -> None:
        if error is not None and self._state.ending:
            error = shutting_down(error)  # whatever it was
        grow = not self._evict
        self._life.spawn_ended(self._model, error, lambda: _copy(error, self._key), grow=grow)
        if error is None:
            self.done.set_result(None)
            return
        if not isinstance(error, ShuttingDown):
            level = logging.INFO if grow else logging.WARNING
            logger.log(level, "No worker for %s: %s", self._key, error)
        self.done.set_exception(error)

    def _spawn(self) -> None:
        spec = self._model.spec
        with self._state.lock:
            cold = not self._model.live_workers
        if not cold:
            self._spawn_workers()
            return
        with spec.stages.cold_start(), spec.warm_up():
            self._spawn_workers()

    def _spawn_workers(self) -> None:
        reserved = self._reserve()
        try:
            self._load(reserved)
        except BaseException:
            for worker in reserved:
                self._abandon(worker)
            raise

    def _load(self, reserved: list[Worker]) -> None:
        """Bring up all workers that can be; raises if there is none."""
        with self._state.lock:
            first = {site.device for site in self._model.sites.values() if not site.dead}
        together: list[Worker] = []
        after: list[Worker] = []
        for worker in reserved:
            # A further worker on a device shares what the first one there loads.
            (after if worker.device in first else together).append(worker)
            if worker in together:
                first.add(worker.device)
        up, error = self._bring_up(together)
        more, second = self._bring_up(after) if error is None or up else (0, None)
        failure = error or second
        if failure is not None:
            if not up + more:
                raise failure
            if self._state.ending:
                return
            logger.warning("A worker for %s could not be spawned: %s", self._key, failure)

    def _bring_up(self, workers: list[Worker]) -> tuple[int, LlavaError | None]:
        """Start the workers and wait for them; how many are up, and why another is not."""
        until = time.monotonic() + self._state.config.spawn_timeout
        for worker in workers:
            try:
                with self._state.lock:
                    run = functools.partial(worker.run, self._life)
                    self._state.start_thread(f"llava-worker-{worker.name}", run)
            except (RuntimeError, ShuttingDown) as refused:
                worker.end_loading(refused)
        up = 0
        failure: LlavaError | None = None
        for worker in workers:
            left = max(0.0, until - time.monotonic())
            try:
                error = worker.loaded.exception(min(left, threading.TIMEOUT_MAX))
            except TimeoutError:
                failure = self._failed(None)
                self._abandon(worker)
                continue
            if error is not None:
                failure = self._failed(error)
                self._abandon(worker)
            else:
                up += 1
                with self._state.lock:
                    total = self._state.ledger.total_mb()
                logger.info(
                    "Spawned worker %d for %s on %s (%d MB in all)",
                    worker.number,
                    self._key,
                    worker.device,
                    total,
                )
        return up, failure

    def _abandon(self, worker: Worker) -> None:
        """Give up a worker that has not loaded; if it ever does, it frees what it took."""
        worker.abandon()
        with self._state.lock:
            if worker.state in (WorkerState.SPAWNING, WorkerState.LOADING):
                worker.become(WorkerState.FAILED)
                self._state.ledger.release(worker)
                self._model.workers.remove(worker)

    def _reserve(self) -> list[Worker]:
        """Find room for workers and reserve it, evicting idle models for the first one."""
        state, model = self._state, self._model
        with state.planning:
            while True:
                with model.spec.stages("devices"):
                    gpus, host = state.probe.gpus(), state.probe.host()
                state.probed = True
                devices = self._working(model.spec.devices(gpus, host))
                need = model.spec.need(devices[0].name)
                with state.lock:
                    if state.closing:
                        raise shutting_down()
                    room = state.config.max_workers - len(model.workers)
                    present = {site.device for site in model.sites.values() if not site.dead}
                    plan = plan_workers(
                        need,
                        devices,
                        host,
                        state.ledger.held(),
                        fraction=state.config.memory_fraction,
                        wanted=min(self._wanted, room),
                        present=frozenset(present),
                    )
                    if plan.placements:
                        return [self._worker(placement) for placement in plan.placements]
                    if self._evict and room > 0:
                        self._evict_one()
                    if not self._none_leaving():
                        if state.changed.wait_for(self._none_leaving, _LEAVING_S):
                            continue
                    elif room <= 0:
                        raise PoolError(f"{self._key} has {len(model.workers)} workers already.")
                raise MemoryExhausted(
                    f"Cannot spawn workers for {self._key}. Need {plan.needed_mb} MB, "
                    f"only {plan.available_mb} MB available{self._would_fit(devices, host)}"
                )

    def _would_fit(self, devices: list[DeviceMemory], host: DeviceMemory) -> str:
        """The end of a message that says in which formats a worker would fit."""
        with self._state.lock:
            held = self._state.ledger.held()
        fraction = self._state.config.memory_fraction
        fitting = [
            f'"{name}" ({need.first_mb} MB)'
            for name, need in self._model.spec.smaller(devices[0].name).items()
            if plan_workers(need, devices, host, held, fraction=fraction, wanted=1).placements
        ]
        if not fitting:
            return ""
        return f"; EngineConfig(quantization=...) would fit with {' or '.join(fitting)}"

    def _working(self, devices: list[DeviceMemory]) -> list[DeviceMemory]:
        """Those that have not failed in this process. Raises DeviceLost if there is none."""
        working = [device for device in devices if device.name not in self._state.lost]
        if working:
            return working
        names = ", ".join(device.name for device in devices)
        error = DeviceLost(
            f"{self._key} cannot run: {names} failed, and only a new process can use it again."
        )
        error.retryable = False
        raise error

    def _worker(self, placement: Placement) -> Worker:
        model = self._model
        worker = Worker(
            model.free_number(),
            self._key,
            placement.device,
            model.spec.loader,
            threads=self._state.config.prepare_threads,
        )
        self._state.ledger.reserve(worker, placement)
        model.workers.append(worker)
        return worker

    def _evict_one(self) -> None:
        """Send the least recently used idle model's workers away. Under the lock."""
        floor = self._state.config.min_workers
        idle = [
            model
            for model in self._state.models.values()
            if model.idle and model is not self._model and len(model.live_workers) > floor
        ]
        if idle:
            victim = min(idle, key=lambda model: model.used_at)
            for worker in victim.live_workers[floor:]:
                victim.evict(worker)

    def _none_leaving(self) -> bool:
        return not any(
            worker.state in (WorkerState.EVICTING, WorkerState.DEAD)
            for model in self._state.models.values()
            for worker in model.workers
        )

    def _failed(self, cause: BaseException | None) -> LlavaError:
        if isinstance(cause, ModelError | ShuttingDown | DeviceLost):
            return cause  # says more than SpawnFailed could
        if cause is None:
            return SpawnFailed(
                f"{self._key} did not load within {self._state.config.spawn_timeout:g} s."
            )
        error = SpawnFailed(f"{self._key} could not be loaded: {in_short(cause)}")
        error.__cause__ = cause.__cause__ if isinstance(cause, SpawnFailed) else cause
        if isinstance(cause, LlavaError):
            error.retryable = cause.retryable
        return error


def _copy(error: LlavaError | None, registry_key: str) -> LlavaError:
    """An error of the same content for one more stream."""
    if error is None:
        return PoolError(f"The workers of {registry_key} ended as soon as they had begun.")
    return copy_of(error, error.__cause__)
