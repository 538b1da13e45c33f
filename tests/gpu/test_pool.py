"""The pool on a real card: what NVML says before, while and after workers are there."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from support.gpu import NEEDS_GPU

import llava_engine
from bench.demo_model.scenes import make_scene, render
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.pool.sizing import SystemProbe
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU

KV_MB = 2048  # per worker: large enough to see beside what the driver keeps


def free_mb() -> int:
    return SystemProbe().gpus()[0].free_mb


def wait_until(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def nothing_is_left(runtime: DeviceRuntime) -> None:
    wait_until(lambda: runtime.load() == 0, "sequences are left")
    assert runtime.num_free_blocks == runtime.num_blocks


def test_nvml_answers(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pynvml")
    gpu = SystemProbe().gpus()[0]
    assert "NVML does not answer" not in caplog.text
    _, total = torch.cuda.mem_get_info(0)
    # NVML counts what the driver keeps for itself too.
    assert 0 <= gpu.total_mb - total // 2**20 < 2048
    assert 0 < gpu.free_mb <= gpu.total_mb


def test_two_workers_come_and_an_eviction_gives_their_memory_back(
    caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    caplog.set_level(logging.INFO)
    picture = render(make_scene(77, 0))
    torch.ones(8, 8, device="cuda", dtype=torch.float16) @ torch.ones(
        8, 8, device="cuda", dtype=torch.float16
    )  # the context and cuBLAS stay for good
    torch.cuda.synchronize()
    with WorkerPool(PoolConfig(idle_timeout=3.0)) as pool:
        model = llava_engine.get(
            "llava-tiny", EngineConfig(device="cuda", kv_cache_mb=KV_MB), pool=pool
        )
        answer = model.describe_image(picture, "Describe the picture.").text()
        assert answer

        def evicted() -> bool:
            return not pool.has_workers(model.registry_key) and pool.total_memory_mb() == 0

        wait_until(evicted, "idle workers are not evicted")
        gc.collect()
        torch.cuda.empty_cache()
        caplog.clear()
        before = free_mb()  # with all that a first use leaves behind

        assert model.describe_image(picture, "Describe the picture.").text() == answer
        wait_until(lambda: "Spawned worker 2" in caplog.text, "no second worker")
        taken, said = before - free_mb(), pool.total_memory_mb()
        record_property("taken_mb", f"{taken} taken, {said} said")
        assert 2 * KV_MB <= taken <= 2 * KV_MB + 512
        assert abs(taken - said) <= 256

        threads = threading.active_count()
        chance = random.Random(3)
        for _ in range(500):
            stream = model.describe_image(picture, "Describe the picture.")
            for _ in range(chance.choice([0, 0, 1, 2])):
                next(stream)
            stream.cancel()
        nothing_is_left(pool._state.models[model.registry_key].sites["cuda:0"].backend._runtime)
        # Up to 4 preparing threads per worker start when needed, and stay.
        assert threading.active_count() <= threads + 8

        wait_until(evicted, "idle workers are not evicted again")
        gc.collect()
        after = free_mb()
        record_property("nvml_mb", f"{before} free, {taken} taken, {after} free after eviction")
        assert before - after <= 128


def test_auto_takes_the_gpu() -> None:
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(kv_cache_mb=64), pool=pool)
        assert model.describe_image(render(make_scene(77, 1)), "Describe the picture.").text()
        assert list(pool._state.models[model.registry_key].sites) == ["cuda:0"]
        assert "cuda:0" in pool.health()["devices"]


def test_a_card_that_is_not_there_is_a_model_error() -> None:
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cuda:97"), pool=pool)
        with pytest.raises(llava_engine.ModelError, match="cuda:97"):
            model.describe_image(render(make_scene(77, 1)), "Describe.").text()
