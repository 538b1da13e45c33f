"""What stands in for a machine and a model in the pool's tests: figures, a clock, a backend."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from llava_engine import PoolConfig, WorkerPool
from llava_engine.errors import LlavaError
from llava_engine.pool.model import Model, ModelSpec
from llava_engine.pool.request import Request
from llava_engine.pool.sizing import DeviceMemory, Need
from llava_engine.types import FinishReason

PICTURE = np.zeros((2, 2, 3), dtype=np.uint8)
GB = 1024


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeProbe:
    """A machine of the given memory, in MiB."""

    def __init__(self, *gpus: DeviceMemory, host: int = 64 * GB, host_free: int | None = None):
        self.devices = list(gpus)
        self.host_memory = DeviceMemory("cpu", host, host if host_free is None else host_free)

    def gpus(self) -> list[DeviceMemory]:
        return list(self.devices)

    def host(self) -> DeviceMemory:
        return self.host_memory


class Digits:
    """A detokenizer that writes each id as a number."""

    def push(self, token_id: int) -> str:
        return str(token_id)

    def flush(self) -> str:
        return ""


class FakeBackend:
    """Answers "7" at once, or holds each request until the test lets it go.

    memory: in MiB, of the weights and of each worker's share.
    """

    def __init__(
        self, *, hold: bool = False, weights: int = 0, share: int = 0, fetched: bytes = b"x"
    ) -> None:
        self.hold = hold
        self.weights, self.share = weights, share
        self.workers: list[str] = []
        self.held: list[tuple[Request, str]] = []
        self.arrived = threading.Semaphore(0)
        self.error: Callable[[Request], BaseException | None] = lambda request: None
        self.fetch_gate = threading.Event()
        self.fetch_gate.set()
        self.fetching = threading.Semaphore(0)
        self.fetched = fetched
        self.fetches = 0
        self.closed = False
        self._on_death: Callable[[BaseException], None] | None = None

    def add_worker(self, name: str) -> None:
        self.workers.append(name)

    def remove_worker(self, name: str) -> None:
        self.workers.remove(name)

    def fetch(self, request: Request) -> bytes:
        self.fetches += 1
        self.fetching.release()
        assert self.fetch_gate.wait(20)
        return self.fetched

    def start(self, request: Request, worker: str) -> None:
        error = self.error(request)
        if error is not None:
            raise error
        request.channel.bind(Digits(), 3, 1)
        if self.hold:
            self.held.append((request, worker))
            self.arrived.release()
        else:
            answer(request)

    def await_held(self, count: int) -> None:
        """Wait until `count` more requests are held."""
        for _ in range(count):
            assert self.arrived.acquire(timeout=20)

    def release(self) -> None:
        """Answer what is held."""
        held, self.held = self.held, []
        for request, _ in held:
            answer(request)

    def memory_mb(self) -> int:
        return 0 if self.closed else self.weights + self.share * len(self.workers)

    def on_death(self, callback: Callable[[BaseException], None]) -> None:
        self._on_death = callback

    def die(self, cause: BaseException) -> None:
        assert self._on_death is not None
        self._on_death(cause)

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """Loads FakeBackends; each load takes the next of `faults`, if any: an exception to raise, or
    an event to wait for first."""

    def __init__(self, *faults: BaseException | threading.Event | None, **options: object) -> None:
        self.faults = list(faults)
        self.options = options
        self.backends: list[FakeBackend] = []
        self.loads: list[str] = []
        self.loading = threading.Semaphore(0)

    def __call__(self, device: str, check: Callable[[], None]) -> FakeBackend:
        self.loads.append(device)
        fault = self.faults.pop(0) if self.faults else None
        self.loading.release()
        if isinstance(fault, threading.Event):
            assert fault.wait(30)
            check()
        elif fault is not None:
            raise fault
        backend = FakeBackend(**self.options)  # type: ignore[arg-type]
        self.backends.append(backend)
        return backend

    @property
    def backend(self) -> FakeBackend:
        """The latest."""
        return self.backends[-1]

    def spec(
        self, key: str = "fake", first: int = 1000, following: int | None = None, host: int = 0
    ) -> ModelSpec:
        need = Need(first, first if following is None else following, host)
        return ModelSpec(key, self, lambda device: need, lambda gpus, host: gpus or [host])


def answer(request: Request) -> None:
    """What the runtime does for an answer of one token."""
    request.channel.start(0)
    request.channel.put(7)
    request.channel.finish(FinishReason.STOP)


def make_pool(probe: FakeProbe | None = None, clock: Clock | None = None, **config: object):
    """A pool on a fake machine."""
    return WorkerPool(
        PoolConfig(**config),  # type: ignore[arg-type]
        probe=probe or FakeProbe(),
        clock=clock or Clock(),
    )


def model_of(pool: WorkerPool, key: str = "fake") -> Model:
    return pool._state.models[key]


def wait_for(pool: WorkerPool, condition: Callable[[], object]) -> None:
    """Wait, without polling, until a spawn, a worker or a request has come to its end and
    `condition` holds."""
    state = pool._state

    def met() -> bool:
        state.settle()
        return bool(condition())

    with state.lock:
        assert state.changed.wait_for(met, 20), "it never came to be"


def error_of(stream: object) -> LlavaError | None:
    """What a stream ends with, waited for."""
    try:
        stream.text()  # type: ignore[attr-defined]
    except LlavaError as error:
        return error
    return None


def ask(pool: WorkerPool, key: str = "fake", **options: object):
    """A request about a picture."""
    return pool.describe_image(key, PICTURE, "What?", **options)


def warm(model: FakeModel, clock: Clock | None = None, **config: object) -> WorkerPool:
    """A pool whose workers are up; held backends come up empty."""
    pool = make_pool(FakeProbe(), clock, **config)
    pool.add_model(model.spec(following=10))
    hold, model.options["hold"] = model.options.get("hold", False), False
    assert ask(pool).text() == "7"
    model.backend.hold = hold
    model.options["hold"] = hold
    wait_for(pool, lambda: not model_of(pool).live)
    return pool
