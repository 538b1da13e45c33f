"""Whatever spawns, fails, dies and is evicted in whatever order: reservations stay within the limit
and end at zero."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.pool_fakes import PICTURE, FakeBackend, FakeProbe, error_of, make_pool, wait_for

from llava_engine.errors import PoolError
from llava_engine.pool.model import ModelSpec
from llava_engine.pool.sizing import DeviceMemory, Need
from llava_engine.pool.worker import LIVE, WorkerState

PICK = st.integers(0, 5)
KEYS = ("a", "b", "c")
GPUS = [DeviceMemory("cuda:0", 1000, 1000), DeviceMemory("cuda:1", 700, 500)]


class Load:
    """One load of a model, which ends as the machine says."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.ends: Future[BaseException | None] = Future()

    def end(self, fault: BaseException | None) -> None:
        with contextlib.suppress(InvalidStateError):
            self.ends.set_result(fault)


class Pools(RuleBasedStateMachine):
    """Three models on two GPUs; loads are held open until a rule ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[Load] = []
        self.over = threading.Event()
        self.backends: list[FakeBackend] = []
        probe = FakeProbe(*GPUS, host=400)
        self.pool = make_pool(probe, max_workers=3)
        self.state = self.pool._state
        needs = {"a": Need(300, 100, 50), "b": Need(400, 400, 100), "c": Need(700, 50, 0)}
        for key in KEYS:
            self.pool.add_model(
                ModelSpec(
                    key,
                    self.loader(key, needs[key]),
                    lambda device, key=key: needs[key],
                    lambda gpus, host: gpus,
                )
            )

    def loader(self, key: str, need: Need) -> Callable[..., FakeBackend]:
        def load(device: str, check: Callable[[], None]) -> FakeBackend:
            loading = Load(key)
            self.loads.append(loading)
            if self.over.is_set():
                loading.end(None)
            fault = loading.ends.result(30)
            if fault is not None:
                raise fault
            share = need.next_mb
            backend = FakeBackend(weights=need.first_mb - share, share=share)
            self.backends.append(backend)
            return backend

        return load

    def quiet(self) -> bool:
        """Whether every spawn waits for a load that a rule has to end, and nothing is leaving."""
        waiting = {load.key for load in self.loads}
        return all(
            (not model.spawning or model.spec.registry_key in waiting)
            and not any(
                worker.state in (WorkerState.EVICTING, WorkerState.DEAD) for worker in model.workers
            )
            for model in self.state.models.values()
        )

    def settle(self) -> None:
        """Until the pool can do nothing more by itself. A load's begin is no end of anything, so
        the condition is woken for it."""
        while True:
            with self.state.lock:
                if self.state.changed.wait_for(self.quiet, 0.01):
                    return

    @rule(key=st.sampled_from(KEYS))
    def request(self, key: str) -> None:
        self.pool.describe_image(key, PICTURE, "What?").cancel()
        self.settle()

    @rule(key=st.sampled_from(KEYS))
    def spawn(self, key: str) -> None:
        self.pool.spawn_vision_worker(key, self.loader(key, Need(1, 1)), 1)
        self.settle()

    # Threads run as they like, so what there is to choose from may differ from run to run: the
    # rules draw a number and take what it points to, or nothing.

    @rule(pick=PICK, fails=st.booleans())
    def load_ends(self, pick: int, fails: bool) -> None:
        if self.loads:
            load = self.loads.pop(pick % len(self.loads))
            load.end(OSError("planted") if fails else None)
            self.settle()

    @rule(pick=PICK)
    def die(self, pick: int) -> None:
        with self.state.lock:
            models = self.state.models.values()
            workers = [w for model in models for w in model.workers if w.state in LIVE]
        if workers:
            worker = workers[pick % len(workers)]
            worker.fail(RuntimeError("planted"))
            wait_for(self.pool, lambda: worker.state is WorkerState.DEAD)
            self.settle()

    @rule(pick=PICK)
    def backend_dies(self, pick: int) -> None:
        alive = [backend for backend in self.backends if not backend.closed and backend._on_death]
        if alive:
            alive[pick % len(alive)].die(RuntimeError("planted"))
            self.settle()

    @rule(seconds=st.sampled_from([1, 40, 301]))
    def time_passes(self, seconds: int) -> None:
        self.state.clock.now += seconds
        self.pool.maintain()
        self.settle()

    @invariant()
    def within_the_limit(self) -> None:
        with self.state.lock:
            held = self.state.ledger.held()
        for device in (*GPUS, self.state.probe.host()):
            assert device.name not in held or held[device.name].total_mb <= device.total_mb * 0.8

    def teardown(self) -> None:
        self.over.set()
        for load in self.loads:
            load.end(None)
        self.pool.shutdown(0)
        assert self.pool.total_memory_mb() == 0
        assert self.state.ledger.held() == {}
        assert all(backend.closed for backend in self.backends)
        stream = self.pool.describe_image("a", PICTURE, "What?")
        assert isinstance(error_of(stream), PoolError)


Pools.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestReservations = Pools.TestCase
