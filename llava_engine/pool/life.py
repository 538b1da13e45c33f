"""How workers come to be and end: spawns, the sites they share, what is left when one dies.

Its methods run on spawn and worker threads. Knows nothing of admission or of pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from llava_engine.errors import DeviceLost, LlavaError, ModelError, SpawnFailed, WorkerDied
from llava_engine.pool.model import Model, Site
from llava_engine.pool.request import copy_of, in_short
from llava_engine.pool.sizing import Placement
from llava_engine.pool.spawn import Spawn
from llava_engine.pool.state import PoolState, shutting_down
from llava_engine.pool.worker import ENDED, LIVE, Backend, Worker, WorkerState

logger = logging.getLogger(__name__)

_FIRST_BACK_OFF = 0.1  # seconds
_MAX_BACK_OFF = 30.0
_GROW_AGAIN = 10.0


class Life:
    """The pool's workers; their `Owner`."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._sites: dict[Worker, Site] = {}

    def begin_spawn(self, model: Model, wanted: int, *, evict: bool = True) -> Spawn | None:
        """A spawn for the caller to start once it has left the lock; None if one is under way.

        evict: whether idle models may have to go for it. Under the lock.
        """
        if model.spawning:
            return None
        model.spawning = True
        return Spawn(self._state, self, model, wanted, evict=evict)

    def spawn_ended(
        self, model: Model, error: LlavaError | None, fresh: Callable[[], LlavaError], *, grow: bool
    ) -> None:
        """A spawn is over: the requests that wait go to the workers there are, or fail, each with
        an error of its own (`fresh`). A model that failed to `grow` goes on as it is."""
        state = self._state
        with state.lock:
            model.spawning = False
            state.settle()
            if error is None:
                model.target = max(model.target, len(model.live_workers))
            elif isinstance(error, DeviceLost):
                model.target = len(model.live_workers)  # or it would be tried for ever
            elif grow:
                model.spawn_after = state.clock() + _GROW_AGAIN
            else:
                self._stumble(model)
                if isinstance(error, SpawnFailed | ModelError):
                    model.breaker.failure(copy_of(error))
            waiting = [request for request in model.live if request.worker is None]
            left = [request for request in waiting if not state.assign(model, request)]
            for request in left:
                # Out of the model's list: the breaker is to count the spawn, not each request.
                del model.live[request]
                request.image = None
            state.changed.notify_all()
        for request in left:
            request.channel.abort(fresh())

    def _stumble(self, model: Model) -> None:
        model.setbacks += 1
        pause = min(_MAX_BACK_OFF, _FIRST_BACK_OFF * 2.0 ** min(model.setbacks - 1, 10))
        model.spawn_after = self._state.clock() + pause

    def worker_loading(self, worker: Worker) -> Backend | None:
        """See Owner."""
        with self._state.lock:
            if self._state.closing or worker.abandoned.is_set():
                raise shutting_down()
            worker.become(WorkerState.LOADING)
            site = self._state.models[worker.registry_key].sites.get(worker.device)
            if site is None:
                return None
            # From now on the backend is not closed before this worker has left, too.
            site.workers.add(worker)
            if site.dead:  # asked after joining: `Site.fail` runs without the lock
                site.workers.discard(worker)
                return None
            self._sites[worker] = site
            return site.backend

    def worker_loaded(self, worker: Worker, backend: Backend) -> bool:
        """See Owner."""
        state = self._state
        measured = backend.memory_mb()
        with state.lock:
            if worker.state is not WorkerState.LOADING or state.closing:
                return False
            model = state.models[worker.registry_key]
            site = self._sites.get(worker)
            joined = site is not None
            if site is None:
                host_mb = state.ledger.host_mb(worker)
                site = Site(worker.device, backend, host_mb, {worker})
                model.sites[worker.device] = self._sites[worker] = site
            state.ledger.release(worker)
            state.ledger.measure(site, Placement(site.device, measured, site.host_mb))
            worker.backend = backend
            worker.become(WorkerState.READY)
            worker.idle_since = state.clock()
        if not joined:
            backend.on_death(site.fail)
        worker.end_loading(None)
        return True

    def worker_ended(self, worker: Worker, cause: BaseException | None) -> None:
        """See Owner."""
        state = self._state
        with state.lock:
            state.settle()
            model = state.models[worker.registry_key]
            died = worker.state in LIVE and cause is not None and not state.ending
            unloaded = worker.state in (WorkerState.SPAWNING, WorkerState.LOADING)
            if unloaded or (isinstance(cause, DeviceLost) and worker.state not in ENDED):
                worker.become(WorkerState.FAILED)
            elif worker.state is not WorkerState.FAILED:
                worker.become(WorkerState.DEAD)
            site = self._sites.pop(worker, None)
            if site is not None:
                site.workers.discard(worker)
                if not site.workers and model.sites.get(site.device) is site:
                    del model.sites[site.device]
            with_it = self._lose(worker.device) if isinstance(cause, DeviceLost) else []
            lost = [request for request in model.live if request.worker is worker]
            if died:
                model.breaker.failure(copy_of(_died(worker, cause)))
                self._stumble(model)
        if died:
            logger.warning("Worker %s died: %r", worker.name, cause)
        for other in with_it:
            assert cause is not None
            other.fail(cause)
        for request in lost:
            request.channel.abort(shutting_down() if state.ending else _died(worker, cause))
        if site is not None:
            self._leave(site, worker)
        with state.lock:
            state.ledger.release(worker)
            if worker in model.workers:
                model.workers.remove(worker)
            worker.backend = None
            state.changed.notify_all()
        worker.end_loading(cause or shutting_down())
        state.ended.put(None)

    def _lose(self, device: str) -> list[Site]:
        """Put nothing on the device any more; what is there, of whatever model. Under the lock."""
        self._state.lost.add(device)
        sites = (model.sites.get(device) for model in self._state.models.values())
        return [site for site in sites if site is not None and not site.dead]

    def _leave(self, site: Site, worker: Worker) -> None:
        """Give back what the worker had of its site, all of it if it was the last."""
        last = not site.workers
        measured = None
        try:
            if last:
                site.backend.close()
            else:
                site.backend.remove_worker(worker.name)
                measured = site.backend.memory_mb()
        except Exception as error:  # noqa: BLE001  a dead backend has given back what it could
            logger.debug("Worker %s left a dead backend: %r", worker.name, error)
        with self._state.lock:
            if last:
                self._state.ledger.release(site)
            elif measured is not None and site.workers:
                placement = Placement(site.device, measured, site.host_mb)
                self._state.ledger.measure(site, placement)


def _died(worker: Worker, cause: BaseException | None) -> WorkerDied:
    if isinstance(cause, DeviceLost):
        lost = DeviceLost(str(cause))
        lost.__cause__ = cause.__cause__
        return lost
    why = f": {in_short(cause)}" if cause is not None else "."
    error = WorkerDied(f"Worker {worker.name} died before the request was done{why}")
    error.__cause__ = cause
    return error
