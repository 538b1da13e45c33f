"""The whole pool with the demo checkpoint, real threads and real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from PIL import Image
from support.http_server import Connection, HttpServer, Request, tunnel
from support.pool_fakes import model_of, wait_for
from support.runtime import until

import llava_engine
from llava_engine import (
    BlockedAddress,
    EngineConfig,
    FetchTimeout,
    ImageDecodeError,
    InvalidQuery,
    PoolConfig,
    PromptTooLong,
    VisionModel,
    WorkerDied,
    WorkerPool,
)

QUERY = "Describe the picture."
CONFIG = EngineConfig(device="cpu", allow_hosts=("127.0.0.1",), kv_cache_mb=32, image_cache_mb=8)


def picture(seed: int = 0) -> Image.Image:
    image = Image.new("RGB", (112, 112), (200, 200, 190))
    image.paste((200, 30, 30), (10 + seed % 40, 10, 50 + seed % 40, 50))
    return image


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(PoolConfig()) as made:
        yield made


@pytest.fixture
def tiny(pool: WorkerPool) -> VisionModel:
    return llava_engine.get("llava-tiny", CONFIG, pool=pool)


def test_the_first_picture_spawns_two_workers_and_a_url_finds_them(
    pool: WorkerPool, tiny: VisionModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llava_engine")
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")

    assert not pool.has_workers(tiny.registry_key)
    said = tiny.describe_image(picture(), QUERY, max_new_tokens=16).text()
    spawned = [text for text in caplog.messages if text.startswith("Spawned worker")]
    assert [text.split(" on cpu")[0] for text in spawned] == [
        f"Spawned worker {number} for {tiny.registry_key}" for number in (1, 2)
    ]
    assert pool.has_workers(tiny.registry_key)
    with HttpServer({"/scene.png": encoded.getvalue()}) as server:
        stream = tiny.describe_url(server.url("/scene.png"), QUERY, max_new_tokens=16)
        assert stream.text() == said and said
    assert len([text for text in caplog.messages if text.startswith("Spawned")]) == 2
    # Both workers' KV shares are in one cache beside one copy of the weights.
    assert 64 <= pool.total_memory_mb() <= 64 + 16 + 8


def test_a_url_through_the_proxy_that_the_configuration_names(pool: WorkerPool) -> None:
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")
    with (
        HttpServer({"/scene.png": encoded.getvalue()}) as server,
        HttpServer({"93.184.215.14:80": tunnel(server.port)}) as proxy,
    ):
        config = dataclasses.replace(CONFIG, proxy=proxy.url(""), allow_hosts=())
        tiny = llava_engine.get("llava-tiny", config, pool=pool)
        stream = tiny.describe_url("http://93.184.215.14/scene.png", QUERY, max_new_tokens=2)
        assert stream.text()
        with pytest.raises(BlockedAddress):
            tiny.describe_url(server.url("/scene.png"), QUERY, max_new_tokens=2).text()
    assert [request.target for request in proxy.requests] == ["93.184.215.14:80"]
    assert server.connections == 1


def test_queries_are_judged_before_a_fetch_and_ask_for_none(tiny: VisionModel) -> None:
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")
    refused = [("NUL \0", InvalidQuery), ("lone \ud800", InvalidQuery)]
    long = ("word " * 2_000, "\u05de" * 900, "x" * (1 << 20))
    refused += [(text, PromptTooLong) for text in long]
    with HttpServer({"/scene.png": encoded.getvalue()}) as server:
        url = server.url("/scene.png")
        for query, error in refused:
            with pytest.raises(error):
                tiny.describe_url(url, query).text()
        # A URL in a question is text.
        tiny.describe_image(picture(), f"What is at {url} ?", max_new_tokens=2).text()
        assert server.connections == 0
        for query in (QUERY, "is it? " * 200):  # the second has more bytes than tokens may be
            tiny.describe_url(url, query, max_new_tokens=2).text()
        assert server.connections == 1


def test_a_file_object_that_raises_what_it_should_not(tiny: VisionModel) -> None:
    class Bad:
        def read(self, size: int = -1) -> bytes:
            raise SystemExit

    for _ in range(9):  # more than the threads that read pictures
        with pytest.raises(ImageDecodeError):
            tiny.describe_image(Bad(), "x", timeout=20).text()


def test_downloads_of_all_models_share_one_budget() -> None:
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")
    png, release = encoded.getvalue(), threading.Event()

    def hold(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(png) + png[:-1])
        release.wait(30)
        connection.send(png[-1:])

    with (
        HttpServer({"/scene.png": png, "/hold": hold}) as server,
        WorkerPool(PoolConfig(max_workers=1, max_fetch_bytes=2 * len(png) - 1)) as pool,
    ):
        one, other = (
            llava_engine.get(
                "llava-tiny", dataclasses.replace(CONFIG, fetch_timeout=seconds), pool=pool
            )
            for seconds in (30.0, 0.5)
        )
        scene = server.url("/scene.png")
        said = other.describe_url(scene, QUERY, max_new_tokens=8).text()
        held = one.describe_url(server.url("/hold"), QUERY, max_new_tokens=8)
        until(lambda: pool._state.fetches._free == len(png) - 1)
        with pytest.raises(FetchTimeout, match="memory"):
            other.describe_url(scene, QUERY).text()
        release.set()
        assert held.text() == said
        assert other.describe_url(scene, QUERY, max_new_tokens=8).text() == said


def test_a_hundred_threads_and_a_hundred_tasks(pool: WorkerPool, tiny: VisionModel) -> None:
    expected = {
        seed: tiny.describe_image(picture(seed), QUERY, max_new_tokens=6).text()
        for seed in range(10)
    }
    said: dict[int, str] = {}

    def caller(index: int) -> None:
        said[index] = tiny.describe_image(picture(index % 10), QUERY, max_new_tokens=6).text()

    async def task(index: int) -> str:
        async with tiny.describe_image(picture(index % 10), QUERY, max_new_tokens=6) as stream:
            return "".join([chunk async for chunk in stream])

    async def tasks() -> list[str]:
        return await asyncio.gather(*(task(index) for index in range(100)))

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(100)]
    for thread in threads:
        thread.start()
    answers = asyncio.run(tasks())
    for thread in threads:
        thread.join(60)
    assert answers == [expected[index % 10] for index in range(100)]
    assert said == {index: expected[index % 10] for index in range(100)}


def test_killing_a_worker_mid_decode_ends_its_streams_alone(
    pool: WorkerPool, tiny: VisionModel
) -> None:
    want = tiny.describe_image(picture(), QUERY, max_new_tokens=64, ignore_eos=True).text()
    streams = [
        tiny.describe_image(picture(), QUERY, max_new_tokens=600, ignore_eos=True)
        for _ in range(16)
    ]
    began_with = {id(stream): next(stream) for stream in streams}  # all 16 are decoding
    model = model_of(pool, tiny.registry_key)
    victim = model.workers[0]
    mine = [request.channel for request in model.live if request.worker is victim]
    began = time.monotonic()
    victim.fail(RuntimeError("killed"))
    for stream in streams:
        if stream._channel in mine:
            with pytest.raises(WorkerDied):
                stream.text()
    assert time.monotonic() - began < 1  # the issue names this bound
    survivors = [stream for stream in streams if stream._channel not in mine]
    assert mine and survivors
    for stream in survivors:
        said = began_with[id(stream)] + "".join(itertools.islice(stream, 24))
        assert len(said) > 24 and said[: len(want)] == want[: len(said)]
        stream.close()
    wait_for(pool, lambda: len(model.live_workers) == 2)  # replaced
    assert tiny.describe_image(picture(), QUERY, max_new_tokens=64, ignore_eos=True).text() == want


def test_evicting_frees_memory_and_the_model_comes_back() -> None:
    config = EngineConfig(device="cpu", kv_cache_mb=200)
    with WorkerPool(PoolConfig(idle_timeout=0.05)) as pool:
        model = llava_engine.get("llava-tiny", config, pool=pool)
        said = model.describe_image(picture(), QUERY).text()
        before, reserved = psutil.Process().memory_info().rss, pool.total_memory_mb()
        wait_for(pool, lambda: not model_of(pool, model.registry_key).workers)
        freed = before - psutil.Process().memory_info().rss
        assert reserved >= 400 and pool.total_memory_mb() == 0
        assert freed > 0
        assert model.describe_image(picture(), QUERY).text() == said


def run(
    code: str, timeout: float, **variables: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"LLAVA_ENGINE_DEVICE": "cpu"} | variables,
    )
    return done, time.monotonic() - began


def test_fifty_pools_leave_nothing_behind() -> None:
    # In a process of its own, with one malloc arena: what threads that come and go leave in theirs
    # would hide a leak of tens of MiB.
    code = """
        import ctypes, gc, threading
        import psutil
        from PIL import Image
        import llava_engine
        from llava_engine import EngineConfig, PoolConfig, WorkerPool

        process = psutil.Process()
        config = EngineConfig(device="cpu", kv_cache_mb=32, image_cache_mb=8)
        image = Image.new("RGB", (112, 112), "red")

        def cycle():
            with WorkerPool(PoolConfig()) as pool:
                model = llava_engine.get("llava-tiny", config, pool=pool)
                assert model.describe_image(image, "Describe it.", max_new_tokens=2).text()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # the heap's free pages come and go by tens of MiB
            assert threading.active_count() == 1, threading.enumerate()
            return process.num_threads(), process.num_fds(), process.memory_info().rss

        _, first, _, last = ([cycle() for _ in range(count)] for count in (5, 10, 25, 10))
        print(*(min(after) - min(before) for before, after in zip(zip(*first), zip(*last))))
    """
    done, _ = run(code, 120, MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    threads, descriptors, rss = map(int, done.stdout.split())
    assert (threads, descriptors) == (0, 0)
    assert rss < 2 << 20  # 35 pools later, of which each loads weights of 14 MiB


LIVE_STREAMS = """
    import sys, threading, time
    import llava_engine
    from PIL import Image
    image = Image.new("RGB", (112, 112), "red")
    model = llava_engine.get("llava-tiny")
    streams = [
        model.describe_image(image, "Describe it.", max_new_tokens=900, ignore_eos=True)
        for _ in range(32)
    ]
    for stream in streams:
        next(stream)
"""


@pytest.mark.parametrize("reader", ["nobody", "daemon threads", "threads"])
def test_the_interpreter_exits_with_32_live_streams(reader: str) -> None:
    code = textwrap.dedent(LIVE_STREAMS)
    if reader != "nobody":
        code += textwrap.dedent(f"""
            def read(stream):
                try:
                    stream.text()
                except llava_engine.ShuttingDown:
                    pass
            for stream in streams:
                threading.Thread(
                    target=read, args=(stream,), daemon={reader == "daemon threads"}
                ).start()
        """)
    code += "print(time.time(), flush=True)\n"
    done, _ = run(code, 60)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ended - float(done.stdout) < 5  # the issue names this bound


def test_a_forked_child_gets_an_error_and_not_a_hang() -> None:
    code = """
        import os, signal
        import llava_engine
        from PIL import Image
        image = Image.new("RGB", (112, 112), "red")
        model = llava_engine.get("llava-tiny")
        model.describe_image(image, "Describe it.", max_new_tokens=2).text()
        held = model.describe_image(image, "Describe it.", max_new_tokens=300, ignore_eos=True)
        next(held)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            pool = llava_engine.vision_pool()
            for use in (
                lambda: pool.describe_image("llava-tiny", image, "x").text(),
                lambda: model.describe_image(image, "x").text(),
                pool.health,
                pool.total_memory_mb,
                lambda: pool.has_workers("llava-tiny"),
                held.text,
                lambda: next(held),
            ):
                try:
                    use()
                except llava_engine.PoolError as error:
                    print("forked" in str(error), error.retryable, flush=True)
            raise SystemExit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        held.close()
        print(bool(model.describe_image(image, "Describe it.", max_new_tokens=2).text()))
    """
    done, _ = run(code, 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True False"] * 7 + ["3", "True"]


def test_asking_imports_no_torch_in_the_callers_thread() -> None:
    code = """
        import sys, threading
        import llava_engine
        model = llava_engine.get("llava-tiny")
        print("torch" in sys.modules)
    """
    done, _ = run(code, 60)
    assert done.stdout == "False\n", done.stderr
