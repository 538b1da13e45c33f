"""Admission, routing, deadlines, failures: a pool over backends of the test."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import numpy as np
import prometheus_client
import pytest
from support.pool_fakes import (
    PICTURE,
    Clock,
    Digits,
    FakeModel,
    ask,
    error_of,
    make_pool,
    model_of,
    wait_for,
    warm,
)
from support.runtime import until

from llava_engine.errors import (
    CircuitOpen,
    FetchTimeout,
    ImageDecodeError,
    MemoryExhausted,
    ModelError,
    PoolOverloaded,
    RequestCancelled,
    RequestFailed,
    RequestTimeout,
    SpawnFailed,
    WorkerDied,
)
from llava_engine.image.budget import Body
from llava_engine.pool.request import Request
from llava_engine.types import FinishReason


def test_a_full_queue_refuses_at_once_and_before_any_fetch() -> None:
    model = FakeModel(hold=True)
    with warm(model, max_queue=256) as pool:
        streams = [ask(pool) for _ in range(256)]
        took = []
        for _ in range(5):
            began = time.perf_counter()
            stream = pool.describe_url("fake", "http://example.com/x.png", "What?")
            with pytest.raises(PoolOverloaded) as raised:
                stream.text()
            took.append(time.perf_counter() - began)
        # The issue names this bound; the best of five leaves out what a busy machine adds.
        assert min(took) < 0.005
        assert 0 < raised.value.retry_after <= 60
        assert model.backend.fetches == 0
        model.backend.await_held(256)
        streams[0].cancel()
        admitted = ask(pool)
        model.backend.await_held(1)
        model.backend.release()
        assert admitted.text() == "7"
        assert [stream.text() for stream in streams[1:]] == ["7"] * 255


def test_running_requests_do_not_fill_the_queue() -> None:
    model = FakeModel(hold=True)
    with warm(model, max_queue=1) as pool:
        first = ask(pool)
        model.backend.await_held(1)
        assert isinstance(error_of(ask(pool)), PoolOverloaded)
        model.backend.held[0][0].channel.start(0)  # a batch has admitted it
        second = ask(pool)
        model.backend.await_held(1)
        model.backend.release()
        assert first.text() == second.text() == "7"


def fill(request: Request) -> None:
    """What the runtime does until a reader who has room for one token is too far behind."""
    request.channel.bind(Digits(), 3, 1, max_unread=1)
    request.channel.start(0)
    request.channel.put(7)


def test_paused_requests_count_until_they_are_read() -> None:
    """Streams that nobody reads must not pile up, each with its picture, without bound."""
    model = FakeModel(hold=True)
    with warm(model, max_queue=3) as pool:
        registry = prometheus_client.CollectorRegistry()
        pool.attach_metrics(registry)
        streams = []
        for _ in range(3):
            streams.append(ask(pool))
            model.backend.await_held(1)
            fill(model.backend.held[-1][0])
        health = pool.health()["models"]["fake"]
        assert (health["queue_depth"], health["paused"], health["running"]) == (0, 3, 0)
        assert registry.get_sample_value("llava_engine_paused", {"model": "fake"}) == 3
        refused = error_of(ask(pool))
        assert isinstance(refused, PoolOverloaded) and "3 of them for their readers" in str(refused)
        assert next(streams[0]) == "7"
        assert pool.health()["models"]["fake"]["running"] == 1
        streams.append(ask(pool))
        model.backend.await_held(1)
        assert isinstance(error_of(ask(pool)), PoolOverloaded)
        streams[1].close()
        streams.append(ask(pool))
        model.backend.await_held(1)
        for request, _ in model.backend.held:
            request.channel.finish(FinishReason.STOP)
        assert [stream.text() for stream in (streams[0], streams[2])] == ["7", "7"]
        assert all(error_of(stream) is None for stream in streams[3:])
        wait_for(pool, lambda: not model_of(pool).live)
        assert pool.health()["models"]["fake"]["paused"] == 0


def test_requests_go_to_the_less_loaded_of_two() -> None:
    model = FakeModel(hold=True)
    with warm(model) as pool:
        streams = [ask(pool) for _ in range(20)]
        model.backend.await_held(20)
        assert [worker.active for worker in model_of(pool).workers] == [10, 10]
        workers = {id(request.channel): worker for request, worker in model.backend.held}
        for stream in streams:
            if workers[id(stream._channel)] == "fake#1":
                stream.cancel()
        model.backend.held.clear()
        more = [ask(pool) for _ in range(10)]
        model.backend.await_held(10)
        assert {worker for _, worker in model.backend.held} == {"fake#1"}
        for stream in (*streams, *more):
            stream.cancel()


def test_slow_urls_delay_no_picture() -> None:
    model = FakeModel()
    with warm(model) as pool:
        backend = model.backend
        backend.fetch_gate.clear()
        slow = [pool.describe_url("fake", f"http://x.example/{i}", "What?") for i in range(8)]
        for _ in slow:
            assert backend.fetching.acquire(timeout=20)
        assert ask(pool).text() == "7"
        backend.fetch_gate.set()
        assert [stream.text() for stream in slow] == ["7"] * 8
        assert all(stream.timings.queued is not None for stream in slow)


def test_a_download_counts_until_it_is_prepared_or_given_up() -> None:
    """Else those that wait for a decoder, which is slower than a fetch, would be without bound."""
    model = FakeModel()
    with warm(model) as pool:
        budget, seen = pool._state.fetches, []
        whole = budget._free

        def fetch(request: Request) -> Body:
            if request.query == "left":
                request.channel.cancel()
                with pool._state.lock:
                    pool._state.settle()
            return Body(b"xyz", budget, budget.take(3, 1.0))

        def look(request: Request) -> Exception | None:
            seen.append(whole - budget._free)
            return ImageDecodeError("broken") if request.query == "bad" else None

        model.backend.fetch, model.backend.error = fetch, look
        ends = {"good": type(None), "bad": ImageDecodeError, "left": RequestCancelled}
        kept = []  # a reader may keep streams and errors for as long as it likes
        for query, end in ends.items():
            stream = pool.describe_url("fake", "http://x.example/", query)
            kept += [stream, error_of(stream)]
            assert isinstance(kept[-1], end)
            until(lambda: budget._free == whole)
        assert seen == [3, 3]


def test_a_deadline_that_passes_in_a_fetch_is_the_requests() -> None:
    model = FakeModel()
    with warm(model) as pool:
        model.backend.fetch_gate.clear()
        stream = pool.describe_url("fake", "http://x.example/", "What?", timeout=0.05)
        with pytest.raises(RequestTimeout):
            stream.text()
        model.backend.fetch_gate.set()

        def late(request):
            wait_until = request.channel.deadline
            while time.monotonic() < wait_until:
                pass
            return FetchTimeout("the picture did not arrive in time")

        model.backend.error = late
        with pytest.raises(RequestTimeout):
            ask(pool, timeout=0.02).text()


def test_a_stream_that_nobody_reads_still_ends_at_its_deadline() -> None:
    model = FakeModel(hold=True)
    with warm(model) as pool:
        stream = ask(pool, timeout=0.01)
        model.backend.await_held(1)
        wait_for(pool, lambda: not model_of(pool).live)  # the maintenance thread has seen to it
        assert isinstance(error_of(stream), RequestTimeout)


@pytest.mark.parametrize(
    "timeout",
    [math.inf, 1e300, 10**400, np.int64(60), np.float32(60)],
    ids=["inf", "1e300", "10**400", "int64", "float32"],
)
def test_a_timeout_is_any_number_and_beyond_what_can_be_waited_for_none(timeout: float) -> None:
    model = FakeModel(hold=True)
    with warm(model, drain=math.inf) as pool:
        stream = ask(pool, timeout=timeout)
        model.backend.await_held(1)
        threading.Timer(0.05, model.backend.release).start()
        assert stream.text() == "7"


def test_the_default_timeout_is_the_pools() -> None:
    with warm(FakeModel(hold=True), default_timeout=20.0) as pool:
        stream = ask(pool)
        assert stream._channel.deadline == pytest.approx(time.monotonic() + 20, abs=5)
        stream.cancel()


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ImageDecodeError("broken"), ImageDecodeError),
        (MemoryError(), MemoryExhausted),
        (ZeroDivisionError("bug"), RequestFailed),
    ],
)
def test_a_failed_preparation_fails_its_request_alone(raised: Exception, seen: type) -> None:
    model = FakeModel()
    with warm(model) as pool:
        model.backend.error = lambda request: raised if request.query == "bad" else None
        bad = pool.describe_image("fake", PICTURE, "bad")
        good = ask(pool)
        error = error_of(bad)
        assert type(error) is seen and (error is raised or error.__cause__ is raised)
        assert good.text() == "7"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_what_no_library_raises_costs_its_request_and_no_thread(kind: type[BaseException]) -> None:
    """A caller's file object may raise anything in a thread of the pool."""
    model = FakeModel()
    with warm(model, max_workers=1, prepare_threads=1) as pool:
        model.backend.error = lambda request: kind() if request.query == "bad" else None
        for _ in range(3):
            error = error_of(pool.describe_image("fake", PICTURE, "bad", timeout=20))
            assert type(error) is ImageDecodeError and isinstance(error.__cause__, kind)
        assert ask(pool, timeout=20).text() == "7"
        wait_for(pool, lambda: not model_of(pool).live)
        assert model_of(pool).breaker.state == "closed"


def test_a_picture_that_blocks_for_ever_holds_up_no_others() -> None:
    gate, began = threading.Event(), threading.Semaphore(0)

    def block(request: Request) -> None:
        if request.query == "blocks":
            began.release()
            gate.wait(60)

    model = FakeModel()
    with warm(model, max_workers=1, prepare_threads=2) as pool:
        registry = prometheus_client.CollectorRegistry()
        pool.attach_metrics(registry)
        model.backend.error = block
        for _ in range(3):
            blocked = [pool.describe_image("fake", PICTURE, "blocks") for _ in range(2)]
            for stream in blocked:
                assert began.acquire(timeout=20)
                stream.cancel()
            pool.maintain()
            pool.maintain()
        (worker,) = pool.health()["models"]["fake"]["workers"]
        assert worker["blocked"] == 6
        assert registry.get_sample_value("llava_engine_blocked_threads", {"model": "fake"}) == 6
        assert ask(pool, timeout=20).text() == "7"
        gate.set()


def test_metrics_that_fail_cost_no_request_anything(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    with warm(model) as pool:
        pool.attach_metrics(prometheus_client.CollectorRegistry())
        pool._state.metrics[0].observe = lambda request, times: 1 / 0
        assert ask(pool).text() == "7"
        wait_for(pool, lambda: not model_of(pool).live)
        assert "Metrics failed" in caplog.text


def test_bad_pictures_do_not_open_the_circuit_but_model_failures_do() -> None:
    clock, model = Clock(), FakeModel()
    with warm(model, clock) as pool:
        for kind in (ImageDecodeError, MemoryExhausted, ImageDecodeError):
            model.backend.error = lambda request, kind=kind: kind("x")
            for _ in range(3):
                assert isinstance(error_of(ask(pool)), kind)
        assert pool.health()["models"]["fake"]["breaker"] == "closed"
        model.backend.error = lambda request: ZeroDivisionError()
        for _ in range(5):
            assert isinstance(error_of(ask(pool)), RequestFailed)
        with pytest.raises(CircuitOpen) as raised:
            ask(pool).text()
        assert raised.value.retry_after == 60
        clock.now += 60
        model.backend.error = lambda request: None
        model.backend.hold = True
        trials = [ask(pool) for _ in range(5)]
        model.backend.await_held(3)
        model.backend.release()
        ended = [error_of(stream) for stream in trials]
        assert [type(error) for error in ended] == [type(None)] * 3 + [CircuitOpen] * 2
        wait_for(pool, lambda: not model_of(pool).live)
        assert pool.health()["models"]["fake"]["breaker"] == "closed"


def test_streams_that_nobody_reads_do_not_keep_the_circuit_open() -> None:
    clock, model = Clock(), FakeModel(hold=True)
    with warm(model, clock) as pool:
        unread = [ask(pool) for _ in range(4)]
        model.backend.await_held(4)
        for request, _ in model.backend.held:
            fill(request)
        model.backend.error = lambda request: ZeroDivisionError()
        for _ in range(5):
            assert isinstance(error_of(ask(pool)), RequestFailed)
        assert isinstance(error_of(ask(pool)), CircuitOpen)
        clock.now += 60
        model.backend.error = lambda request: None
        model.backend.hold = False
        assert [error_of(ask(pool)) for _ in range(3)] == [None] * 3
        wait_for(pool, lambda: len(model_of(pool).live) == 4)
        assert pool.health()["models"]["fake"]["breaker"] == "closed"
        model.backend.held.clear()
        for stream in unread:
            stream.close()


def test_a_loader_that_keeps_failing_opens_the_circuit() -> None:
    with make_pool() as pool:
        pool.add_model(FakeModel(*[OSError("x") for _ in range(9)]).spec())
        kinds = [type(error_of(ask(pool))).__name__ for _ in range(7)]
        assert kinds == ["SpawnFailed"] * 5 + ["CircuitOpen"] * 2


@pytest.mark.parametrize("retryable", [False, True])
def test_an_open_circuit_says_what_for_and_is_as_little_retryable(retryable: bool) -> None:
    kind = SpawnFailed if retryable else ModelError
    with make_pool() as pool:
        pool.add_model(FakeModel(*[kind("planted") for _ in range(9)]).spec())
        errors = [error_of(ask(pool)) for _ in range(7)]
        assert [type(error) for error in errors] == [kind] * 5 + [CircuitOpen] * 2
        assert [error.retryable for error in errors] == [retryable] * 7
        refused = errors[-1]
        assert "planted" in str(refused) and type(refused.__cause__) is kind
        assert refused.__cause__.__traceback__ is None


def test_an_open_circuit_for_requests_that_failed_is_retryable() -> None:
    model = FakeModel()
    with warm(model) as pool:
        model.backend.error = lambda request: ZeroDivisionError()
        for _ in range(5):
            assert isinstance(error_of(ask(pool)), RequestFailed)
        refused = error_of(ask(pool))
        assert isinstance(refused, CircuitOpen) and refused.retryable
        assert isinstance(refused.__cause__, RequestFailed)
        # Its frames hold a picture; so would those of what was raised below it.
        assert refused.__cause__.__traceback__ is refused.__cause__.__cause__ is None


def test_a_worker_that_dies_ends_its_own_streams_and_is_replaced() -> None:
    clock, model = Clock(), FakeModel(hold=True, share=10)
    with warm(model, clock) as pool:
        streams = [ask(pool) for _ in range(16)]
        model.backend.await_held(16)
        victim = model_of(pool).workers[0]
        cause = RuntimeError("killed")
        began = time.perf_counter()
        victim.fail(cause)
        wait_for(pool, lambda: victim not in model_of(pool).workers)
        model.backend.release()
        errors = [error_of(stream) for stream in streams]
        assert time.perf_counter() - began < 1  # the issue names this bound
        dead = [error for error in errors if error is not None]
        assert len(dead) == 8 and len({id(error) for error in dead}) == 8
        assert all(type(error) is WorkerDied and error.__cause__ is cause for error in dead)
        assert pool.total_memory_mb() == 10 and model.backend.workers == ["fake#2"]
        pool.maintain()
        assert len(model_of(pool).workers) == 1  # not before the back-off is over
        clock.now += 0.1
        pool.maintain()
        wait_for(pool, lambda: len(model_of(pool).live_workers) == 2)
        assert sorted(model.backend.workers) == ["fake#1", "fake#2"]


def test_a_backend_that_dies_takes_all_its_workers_along() -> None:
    model = FakeModel(hold=True, share=10)
    with warm(model) as pool:
        streams = [ask(pool) for _ in range(6)]
        model.backend.await_held(6)
        first = model.backend
        first.die(RuntimeError("lost the device"))
        assert all(isinstance(error_of(stream), WorkerDied) for stream in streams)
        wait_for(pool, lambda: not model_of(pool).workers)
        assert first.closed and pool.total_memory_mb() == 0
        model.options["hold"] = False
        assert ask(pool).text() == "7"  # a request does not wait for the back-off
        assert len(model.loads) == 2 and model_of(pool).breaker.state == "closed"


@pytest.mark.parametrize("how", ["the first worker", "the backend"])
def test_what_dies_while_a_second_worker_joins(how: str) -> None:
    """The joining worker keeps the model alive, or goes with it; it never serves a closed one."""
    model = FakeModel(share=10)
    with make_pool() as pool:
        pool.spawn_vision_worker("fake", model, 100).result(20)
        backend, (first,) = model.backend, model_of(pool).workers
        add = backend.add_worker

        def add_worker(name: str) -> None:
            if how == "the backend":
                backend.die(RuntimeError("planted"))
            else:
                first.fail(RuntimeError("planted"))
            wait_for(pool, lambda: first not in model_of(pool).workers)
            add(name)

        backend.add_worker = add_worker
        second = pool.spawn_vision_worker("fake", model, 100)
        second.exception(20)
        if how == "the backend":
            wait_for(pool, lambda: not model_of(pool).workers)
            assert backend.closed and pool.total_memory_mb() == 0
        else:
            assert second.exception() is None and not backend.closed
            assert pool.total_memory_mb() == 10
        assert ask(pool).text() == "7"
