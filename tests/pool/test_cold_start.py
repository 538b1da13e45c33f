"""From no worker to some: how many, one spawn for all, and what each failure says."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable

import pytest
from support.pool_fakes import (
    GB,
    FakeBackend,
    FakeModel,
    FakeProbe,
    ask,
    error_of,
    make_pool,
    model_of,
    wait_for,
)

from llava_engine import WorkerPool
from llava_engine.errors import (
    CircuitOpen,
    MemoryExhausted,
    ModelError,
    NoWorkers,
    PoolError,
    RequestTimeout,
    ShuttingDown,
    SpawnFailed,
    WeightsError,
)
from llava_engine.pool.sizing import DeviceMemory, Need
from llava_engine.pool.worker import Backend, WorkerState


def devices(pool: WorkerPool, key: str = "fake") -> list[str]:
    return [worker["device"] for worker in pool.health()["models"][key]["workers"]]


@pytest.mark.parametrize(("host", "count"), [(2500, 2), (2499, 1), (1250, 1)])
def test_the_first_request_spawns_as_many_as_fit(
    host: int, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llava_engine")
    model = FakeModel(weights=0, share=1000)
    with make_pool(FakeProbe(host=host)) as pool:
        pool.add_model(model.spec())
        assert not pool.has_workers("fake") and pool.total_memory_mb() == 0
        assert ask(pool).text() == "7"
        assert pool.has_workers("fake")
        assert pool.total_memory_mb() == count * 1000
        assert devices(pool) == ["cpu"] * count
        assert model.loads == ["cpu"]  # the second shares what the first loaded
        spawned = [text for text in caplog.messages if text.startswith("Spawned worker")]
        assert [text.split(" on ")[0] for text in spawned] == [
            f"Spawned worker {number} for fake" for number in range(1, count + 1)
        ]
    assert pool.total_memory_mb() == 0 and model.backend.closed


def test_nothing_fits() -> None:
    model = FakeModel()
    with make_pool(FakeProbe(host=1249)) as pool:
        pool.add_model(model.spec())
        with pytest.raises(MemoryExhausted) as raised:
            ask(pool).text()
        assert str(raised.value) == (
            "Cannot spawn workers for fake. Need 1000 MB, only 999 MB available"
        )
        assert pool.total_memory_mb() == 0 and not model.loads
        pool._state.probe = FakeProbe(host=64 * GB)
        assert ask(pool).text() == "7"  # a later request tries again


def test_a_full_gpu_has_nothing_available_and_never_less() -> None:
    gpu = DeviceMemory("cuda:0", 24 * GB, 0)
    with make_pool(FakeProbe(gpu)) as pool:
        pool.add_model(FakeModel().spec(first=20 * GB))
        with pytest.raises(MemoryExhausted, match="Need 20480 MB, only 0 MB available"):
            ask(pool).text()


@pytest.mark.parametrize(
    ("free", "fits"),
    [
        (
            20 * GB,
            '; EngineConfig(quantization=...) would fit with "int8" (900 MB) or "nf4" (400 MB)',
        ),
        (800, '; EngineConfig(quantization=...) would fit with "nf4" (400 MB)'),
        (300, ""),
    ],
)
def test_the_message_says_in_which_formats_a_worker_would_fit(free: int, fits: str) -> None:
    needs = {"int8": Need(900, 100, 10), "nf4": Need(400, 100, 10)}
    spec = dataclasses.replace(FakeModel().spec(first=30 * GB), smaller=lambda device: needs)
    with make_pool(FakeProbe(DeviceMemory("cuda:0", 24 * GB, free))) as pool:
        pool.add_model(spec)
        with pytest.raises(MemoryExhausted) as raised:
            ask(pool).text()
        limit = min(free, 24 * GB * 8 // 10)
        assert str(raised.value) == (
            f"Cannot spawn workers for fake. Need 30720 MB, only {limit} MB available{fits}"
        )


def test_the_estimate_gives_way_to_what_was_measured() -> None:
    model = FakeModel(weights=300, share=50)
    gpus = [DeviceMemory(f"cuda:{i}", 24 * GB, 24 * GB - i) for i in range(2)]
    with make_pool(FakeProbe(*gpus)) as pool:
        pool.add_model(model.spec(first=2000, following=500, host=100))
        assert ask(pool).text() == "7"
        # 2000 then 500 beside it leaves less room than 2000 on the other GPU: it goes there.
        assert sorted(devices(pool)) == ["cuda:0", "cuda:1"]
        assert pool.total_memory_mb() == 2 * 350
        memory = pool.health()["devices"]
        assert [memory[name]["used_mb"] for name in ("cuda:0", "cuda:1", "cpu")] == [350, 350, 200]
        assert memory["cuda:0"]["limit_mb"] == int(24 * GB * 0.8)


def test_a_hundred_first_requests_load_once() -> None:
    gate = threading.Event()
    model = FakeModel(gate)
    with make_pool() as pool:
        pool.add_model(model.spec(following=10))
        streams = []
        started = threading.Barrier(100)

        def caller() -> None:
            started.wait(20)
            streams.append(ask(pool))

        threads = [threading.Thread(target=caller) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        gate.set()
        assert [stream.text() for stream in streams] == ["7"] * 100
        assert model.loads == ["cpu"]


def test_a_failed_spawn_reaches_all_who_wait_and_the_next_request_tries_again() -> None:
    gate, cause = threading.Event(), OSError("disk on fire")

    class Broken(FakeModel):
        def __call__(self, device, check):
            self.loads.append(device)
            if len(self.loads) <= 2:
                assert gate.wait(20)
                raise cause
            return super().__call__(device, check)

    model = Broken()
    with make_pool() as pool:
        pool.add_model(model.spec())
        streams = [ask(pool) for _ in range(20)]
        gate.set()
        errors = [error_of(stream) for stream in streams]
        assert all(type(error) is SpawnFailed for error in errors)
        assert all(error.__cause__ is cause and error.retryable for error in errors)
        assert len({id(error) for error in errors}) == 20  # tracebacks of threads must not mix
        assert pool.total_memory_mb() == 0 and not pool.has_workers("fake")
        assert isinstance(error_of(ask(pool)), SpawnFailed)
        assert ask(pool).text() == "7"
        assert model_of(pool).breaker.state == "closed"  # 2 failures, not 21


def test_a_checkpoint_that_is_broken_says_so_itself() -> None:
    gate = threading.Event()

    def loader(device, check):
        assert gate.wait(20)
        raise WeightsError("the checkpoint lacks tensor x")

    with make_pool() as pool:
        pool.add_model(dataclasses.replace(FakeModel().spec(), loader=loader))
        streams = [ask(pool) for _ in range(8)]
        gate.set()
        for stream in streams:
            with pytest.raises(WeightsError, match="lacks tensor x"):
                stream.text()
        wait_for(pool, lambda: not model_of(pool).spawning)
        assert model_of(pool).breaker.state == "closed"  # it failed once, not eight times


@pytest.mark.parametrize("fault", [MemoryError(), MemoryExhausted("no room for the weights")])
def test_memory_that_runs_out_while_loading_is_a_failed_spawn(fault: Exception) -> None:
    with make_pool() as pool:
        pool.add_model(FakeModel(fault).spec())
        with pytest.raises(SpawnFailed) as raised:
            ask(pool).text()
        assert raised.value.__cause__ is fault
        assert pool.total_memory_mb() == 0
        assert ask(pool).text() == "7"


def test_an_exception_that_is_kept_keeps_no_weights() -> None:
    class Weights:
        """What a loader had read when it failed."""

    read: list[weakref.ref[Weights]] = []

    def loader(device: str, check: Callable[[], None]) -> Backend:
        weights = Weights()
        read.append(weakref.ref(weights))
        raise RuntimeError("truncated")

    with make_pool() as pool:
        error = pool.spawn_vision_worker("fake", loader, 10).exception(20)
    assert isinstance(error, SpawnFailed) and isinstance(error.__cause__, RuntimeError)
    gc.collect()
    assert [ref() for ref in read] == [None]


def test_a_load_that_hangs_is_given_up_and_frees_what_it_took_in_the_end() -> None:
    gate = threading.Event()
    model = FakeModel(gate, weights=5)
    with make_pool(spawn_timeout=0.05) as pool:
        pool.add_model(model.spec())
        with pytest.raises(SpawnFailed, match="did not load within 0.05 s"):
            ask(pool).text()
        assert pool.total_memory_mb() == 0
        assert ask(pool).text() == "7"  # another load, while the first still hangs
        hung = [t for t in threading.enumerate() if t.name == "llava-worker-fake#1"]
        gate.set()
        for thread in hung[:1]:
            thread.join(0.01)
        assert len(model.loads) == 2


def test_a_load_that_ends_too_late_is_closed() -> None:
    gate, loaded = threading.Event(), []

    class Late(FakeModel):
        def __call__(self, device, check):
            self.loading.release()
            assert gate.wait(20)
            loaded.append(super().__call__(device, check))  # and never looks at `check`
            return loaded[0]

    model = Late()
    pool = make_pool(spawn_timeout=0.05)
    pool.add_model(model.spec())
    assert isinstance(error_of(ask(pool)), SpawnFailed)
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("llava-worker-fake")]
    gate.set()
    thread.join(20)
    assert loaded[0].closed and pool.total_memory_mb() == 0 and not pool.has_workers("fake")
    pool.shutdown()


@pytest.mark.parametrize("seconds", [math.inf, 1e10])
def test_a_patience_beyond_what_can_be_waited_for(seconds: float) -> None:
    gate = threading.Event()
    model = FakeModel(gate)  # so that the spawn waits
    with make_pool() as pool:
        object.__setattr__(pool.config, "spawn_timeout", seconds)  # whatever PoolConfig allows
        pool.add_model(model.spec())
        stream = ask(pool)
        assert model.loading.acquire(timeout=20)
        assert stream._channel.error is None
        gate.set()
        assert stream.text() == "7"


def test_what_fails_before_the_load_gives_the_reservation_back() -> None:
    model = FakeModel()
    with make_pool() as pool:
        pool.add_model(model.spec())
        start = pool._state.start_thread

        def refuse(name: str, target: Callable[[], None]) -> None:
            if name.startswith("llava-worker"):
                raise OverflowError("planted")
            start(name, target)

        pool._state.start_thread = refuse
        for _ in range(3):
            with pytest.raises(SpawnFailed, match="OverflowError: planted"):
                ask(pool).text()
        assert pool.total_memory_mb() == 0 and not model_of(pool).workers
        pool._state.start_thread = start
        assert ask(pool).text() == "7"


def test_a_model_that_cannot_be_measured_is_closed() -> None:
    class Unmeasured(FakeBackend):
        def memory_mb(self) -> int:
            raise RuntimeError("planted")

    backend = Unmeasured()
    with make_pool() as pool:
        done = pool.spawn_vision_worker("fake", lambda device, check: backend, 10)
        assert isinstance(done.exception(20), SpawnFailed)
        wait_for(pool, lambda: not model_of(pool).workers)
        assert backend.closed and pool.total_memory_mb() == 0


class OddError(ModelError):
    """Of a loader that somebody else wrote."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(path, line)
        self.line = line


class MuteError(Exception):
    """So is this."""

    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("fault", "seen"), [(OddError("x", 7), OddError), (MuteError(), SpawnFailed)]
)
def test_whatever_a_loader_raises_reaches_all_who_wait(fault: Exception, seen: type) -> None:
    with make_pool() as pool:
        pool.add_model(FakeModel(*[fault] * 5).spec())
        for _ in range(5):
            assert type(error_of(ask(pool, timeout=20))) is seen
        refused = error_of(ask(pool, timeout=20))
        assert isinstance(refused, CircuitOpen) and type(refused.__cause__) is seen
        assert getattr(refused.__cause__, "line", 7) == 7


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            RuntimeError("can not allocate\nmore"),
            "RuntimeError: can not allocate",
        ),
        (
            OSError(28, "No space left on device", "/secret/path"),
            "OSError: No space left on device",
        ),
        (ValueError(), "ValueError"),
        (RuntimeError("x" * 500), "RuntimeError: " + "x" * 200 + "..."),
    ],
)
def test_a_failed_spawn_says_in_one_line_why(cause: Exception, said: str) -> None:
    with make_pool() as pool:
        pool.add_model(FakeModel(cause).spec())
        error = error_of(ask(pool))
        assert isinstance(error, SpawnFailed) and error.__cause__ is cause
        assert f"could not be loaded: {said}" in str(error)
        assert "\n" not in str(error) and "secret" not in str(error) and len(str(error)) < 300


def test_a_deadline_counts_the_cold_start() -> None:
    gate = threading.Event()
    with make_pool() as pool:
        pool.add_model(FakeModel(gate).spec())
        with pytest.raises(RequestTimeout):
            ask(pool, timeout=0.05).text()
        gate.set()


def test_the_caller_neither_loads_nor_waits() -> None:
    gate = threading.Event()
    model = FakeModel(gate)
    with make_pool() as pool:
        pool.add_model(model.spec())
        began = time.perf_counter()
        stream = ask(pool)
        assert time.perf_counter() - began < 0.1
        assert model.loading.acquire(timeout=20)
        assert pool.health()["models"]["fake"]["state"] == "spawning"
        gate.set()
        assert stream.text() == "7"


def test_a_model_nobody_told_the_pool_of() -> None:
    with make_pool() as pool:
        with pytest.raises(NoWorkers):
            ask(pool, "unheard").text()
        assert not pool.has_workers("unheard")


def test_spawn_vision_worker_spawns_one_each_time() -> None:
    model = FakeModel(share=10)
    with make_pool(FakeProbe(host=3000)) as pool:
        pool.spawn_vision_worker("fake", model, 1000).result(20)
        assert pool.has_workers("fake") and devices(pool) == ["cpu"]
        pool.spawn_vision_worker("fake", model, 1000).result(20)
        assert devices(pool) == ["cpu", "cpu"]
        with pytest.raises(PoolError, match="2 workers already"):
            pool.spawn_vision_worker("fake", model, 1000).result(20)
        with pytest.raises(MemoryExhausted):
            pool.spawn_vision_worker("big", model, 2500).result(20)
        with pytest.raises(ValueError, match="above 0"):
            pool.spawn_vision_worker("fake", model, 0)
        assert ask(pool).text() == "7"
    with pytest.raises(ShuttingDown):
        pool.spawn_vision_worker("fake", model, 1000).result(20)


def test_the_least_recently_used_idle_model_makes_room() -> None:
    models = {key: FakeModel(share=400) for key in ("old", "new", "busy", "big")}
    models["busy"].options["hold"] = True
    with make_pool(FakeProbe(host=2500), max_workers=1) as pool:
        for key in ("old", "new", "busy"):
            pool.add_model(models[key].spec(key, first=500))
        pool.add_model(models["big"].spec("big", first=1000))
        held = ask(pool, "busy")
        models["busy"].loading.acquire(timeout=20)
        wait_for(pool, lambda: pool._state.models["busy"].live_workers)
        models["busy"].backend.await_held(1)
        assert ask(pool, "old").text() == ask(pool, "new").text() == "7"
        wait_for(pool, lambda: not model_of(pool, "old").live and not model_of(pool, "new").live)
        pool._state.clock.now += 1
        assert ask(pool, "old").text() == "7"  # now "new" is the least recently used
        wait_for(pool, lambda: not model_of(pool, "old").live)
        assert pool.total_memory_mb() == 1200
        assert ask(pool, "big").text() == "7"
        assert not pool.has_workers("new") and models["new"].backend.closed
        assert pool.has_workers("old") and pool.has_workers("busy")
        models["busy"].backend.release()
        assert held.text() == "7"
        assert ask(pool, "new").text() == "7"  # and back it comes


def test_busy_models_are_not_evicted() -> None:
    busy = FakeModel(share=900, hold=True)
    with make_pool(FakeProbe(host=1500), max_workers=1) as pool:
        pool.add_model(busy.spec("busy", first=1000))
        pool.add_model(FakeModel().spec("other", first=1000))
        stream = ask(pool, "busy")
        busy.loading.acquire(timeout=20)
        wait_for(pool, lambda: pool._state.models["busy"].live_workers)
        busy.backend.await_held(1)
        with pytest.raises(MemoryExhausted, match="only 300 MB"):
            ask(pool, "other").text()
        busy.backend.release()
        assert stream.text() == "7"


def test_transitions_are_those_of_the_design() -> None:
    model = FakeModel()
    with make_pool(max_workers=1) as pool:
        pool.add_model(model.spec())
        ask(pool).text()
        wait_for(pool, lambda: not model_of(pool).live)
        (worker,) = model_of(pool).workers
        assert worker.state is WorkerState.READY
        with pytest.raises(RuntimeError, match="from ready to loading"):
            worker.become(WorkerState.LOADING)
    assert worker.state is WorkerState.DEAD
