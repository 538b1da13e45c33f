"""The pool's end, and how it looks from outside: shutdown, health, metrics, arguments."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading

import prometheus_client
import pytest
from support.pool_fakes import (
    PICTURE,
    FakeModel,
    ask,
    error_of,
    make_pool,
    model_of,
    wait_for,
    warm,
)

from llava_engine import WorkerPool
from llava_engine.errors import (
    ImageDecodeError,
    PoolError,
    ShuttingDown,
)


def threads() -> set[threading.Thread]:
    """The engine's, of the process's own pool, too, which other tests use."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("llava-")}


def test_shutdown_lets_requests_end_and_refuses_new_ones() -> None:
    others = threads()
    model = FakeModel(hold=True)
    pool = warm(model)
    stream = ask(pool)
    model.backend.await_held(1)
    done = threading.Thread(target=pool.shutdown, args=(20,))
    done.start()
    wait_for(pool, lambda: pool._state.closing)
    assert isinstance(error_of(ask(pool)), ShuttingDown)
    model.backend.release()
    assert stream.text() == "7"
    done.join(20)
    assert threads() <= others
    assert model.backend.closed and pool.total_memory_mb() == 0
    pool.shutdown()
    assert pool.health()["status"] == "closing"


def test_shutdown_ends_what_does_not_end_by_itself() -> None:
    others = threads()
    gate = threading.Event()
    model = FakeModel(hold=True)
    pool = warm(model)
    pool.add_model(FakeModel(gate).spec("loading"))
    streams = [ask(pool) for _ in range(4)]
    streams.append(pool.describe_image("loading", PICTURE, "What?"))
    model.backend.await_held(4)
    model.backend.fetch_gate.clear()
    streams.append(pool.describe_url("fake", "http://x.example/", "What?"))
    assert model.backend.fetching.acquire(timeout=20)
    threading.Timer(0.05, lambda: (gate.set(), model.backend.fetch_gate.set())).start()
    pool.shutdown(0)
    errors = [error_of(stream) for stream in streams]
    assert [type(error) for error in errors] == [ShuttingDown] * 6
    assert len({id(error) for error in errors}) == 6
    assert threads() <= others
    assert pool.total_memory_mb() == 0


def test_a_load_that_the_interpreters_end_breaks_off_is_told_as_that_and_not_logged() -> None:
    """Threads and exit handlers are refused before the pool's own exit handler has been called."""
    code = """
        import threading
        import numpy
        import llava_engine
        from llava_engine.pool.model import ModelSpec
        from llava_engine.pool.sizing import Need
        pool = llava_engine.WorkerPool()
        loading, ending = threading.Event(), threading.Event()

        def load(device, check):
            loading.set()
            ending.wait(20)
            threading._register_atexit(print)  # what importing concurrent.futures.thread does

        def read(stream):
            try:
                stream.text()
            except llava_engine.LlavaError as error:
                print(type(error).__name__, repr(error.__cause__))

        need = Need(1, 1)
        pool.add_model(ModelSpec("fake", load, lambda device: need, lambda gpus, host: [host]))
        stream = pool.describe_image("fake", numpy.zeros((2, 2, 3), numpy.uint8), "What?")
        reader = threading.Thread(target=read, args=(stream,))
        reader.start()
        loading.wait(20)

        def before_the_pool_is_closed():
            assert not pool._state.closing
            ending.set()
            reader.join(20)

        threading._register_atexit(before_the_pool_is_closed)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout.startswith("ShuttingDown SpawnFailed("), done.stdout
    assert "atexit after shutdown" in done.stdout


def test_a_pool_that_was_never_used_shuts_down_too() -> None:
    pool = make_pool()
    assert pool.health() == {"status": "ok", "total_memory_mb": 0, "devices": {}, "models": {}}
    pool.shutdown()


def test_an_event_loop_is_not_blocked() -> None:
    gate = threading.Event()
    model = FakeModel(gate)

    async def run(pool: WorkerPool) -> list[str]:
        streams = [ask(pool) for _ in range(50)]
        tasks = [asyncio.create_task(stream.atext()) for stream in streams]
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)  # the loop runs, and the model loads
        gate.set()
        return await asyncio.gather(*tasks)

    with make_pool() as pool:
        pool.add_model(model.spec())
        assert asyncio.run(run(pool)) == ["7"] * 50


def test_arguments_are_judged_at_the_call() -> None:
    with make_pool() as pool:
        for options, error in (
            ({"timeout": "1"}, TypeError),
            ({"timeout": 0}, ValueError),
            ({"timeout": float("nan")}, ValueError),
            ({"priority": 1.5}, TypeError),
            ({"cache_salt": b"x"}, TypeError),
        ):
            with pytest.raises(error):
                ask(pool, **options)
        with pytest.raises(TypeError):
            pool.describe_image("fake", 5, "What?")
        with pytest.raises(TypeError):
            pool.describe_image("fake", PICTURE, None)
        with pytest.raises(TypeError):
            pool.describe_url("fake", b"http://x.example", "What?")


def test_type_errors_name_the_argument() -> None:
    with make_pool() as pool:
        for name, call in {
            "drain_s": lambda: pool.shutdown("x"),
            "sampling": lambda: ask(pool, sampling={"a": 1}),
            "registry_key": lambda: ask(pool, ["llava-tiny"]),
            "registry": lambda: pool.attach_metrics(3),
            "config": lambda: WorkerPool({}),
        }.items():
            with pytest.raises(TypeError, match=f"^{name} must be"):
                call()
        for drain_s in (-1, float("nan")):
            with pytest.raises(ValueError, match="drain_s"):
                pool.shutdown(drain_s)
        assert pool.health()["status"] == "ok"


def test_a_registry_takes_the_metrics_of_one_pool_once() -> None:
    registry = prometheus_client.CollectorRegistry()
    with make_pool() as other, make_pool() as pool:
        pool.attach_metrics(registry)
        for again in (pool, other):
            with pytest.raises(PoolError, match="CollectorRegistry of its own") as raised:
                again.attach_metrics(registry)
            assert not raised.value.retryable
        other.attach_metrics(prometheus_client.CollectorRegistry())
        pool.shutdown()
        other.attach_metrics(registry)  # the first pool's went with it


def test_a_registry_that_has_one_of_the_names_gets_none_of_the_others() -> None:
    registry = prometheus_client.CollectorRegistry()
    taken = prometheus_client.Counter("llava_engine_tokens", "Not ours.", registry=registry)
    with make_pool() as pool:
        with pytest.raises(PoolError):
            pool.attach_metrics(registry)
        registry.unregister(taken)
        assert prometheus_client.generate_latest(registry) == b""
        pool.attach_metrics(registry)


def test_health_is_json_and_metrics_count_what_happened() -> None:
    model = FakeModel(hold=True, share=10)
    with warm(model) as pool:
        registry = prometheus_client.CollectorRegistry()
        pool.attach_metrics(registry)
        model.backend.error = lambda request: (
            ImageDecodeError("x") if request.query == "bad" else None
        )
        assert error_of(pool.describe_image("fake", PICTURE, "bad"))
        stream = ask(pool)
        model.backend.await_held(1)
        health = pool.health()["models"]["fake"]
        assert health["queue_depth"] == 1 and health["state"] == "processing"
        text = prometheus_client.generate_latest(registry).decode()
        assert 'llava_engine_queue{model="fake"} 1.0' in text
        model.backend.release()
        assert stream.text() == "7"
        wait_for(pool, lambda: not model_of(pool).live)
        health = json.loads(json.dumps(pool.health()))["models"]["fake"]
        assert health["queue_depth"] == health["running"] == 0
        assert health["outcomes"] == {"stop": 2, "ImageDecodeError": 1}
        assert health["latency"]["total"]["p95"] >= health["latency"]["first_token"]["p50"] > 0
        text = prometheus_client.generate_latest(registry).decode()
        for line in (
            'llava_engine_requests_total{model="fake",outcome="stop"} 1.0',
            'llava_engine_requests_total{model="fake",outcome="ImageDecodeError"} 1.0',
            'llava_engine_tokens_total{model="fake"} 1.0',
            'llava_engine_first_token_seconds_count{model="fake"} 1.0',
            'llava_engine_workers{model="fake",state="ready"} 2.0',
            'llava_engine_memory_bytes{device="cpu",kind="used"} 2.097152e+07',
        ):
            assert line in text, line
    assert prometheus_client.generate_latest(registry) == b""
