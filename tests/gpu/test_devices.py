"""GPUs that fail for good, and more than one of them.

What fails for good takes the process's CUDA context along, so it happens in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
import torch
from support.gpu import NEEDS_GPU

import llava_engine
from bench.demo_model.scenes import make_scene, render
from llava_engine import EngineConfig, PoolConfig, WorkerPool

pytestmark = NEEDS_GPU

ROOT = Path(__file__).parents[2]

# In all three something is left on the device that its next synchronisation finds out.
FAULTS = {
    "device-assert-in-prefill": """
        def fault():
            table = torch.ones(4, device="cuda")
            torch.index_select(table, 0, torch.tensor([1 << 30], device="cuda"))
    """,
    "illegal-address-in-our-kernel": """
        def fault():
            # Slots far behind the cache's end: the kernel trusts them.
            from llava_engine.kernels.rope_kv import rope_append
            q, k, v = (torch.ones(1, 2, 64, dtype=torch.float16, device="cuda") for _ in range(3))
            caches = [torch.ones(1, 2, 16, 64, dtype=torch.float16, device="cuda") for _ in "kv"]
            angles = torch.ones(8, 64, device="cuda")
            positions = torch.zeros(1, dtype=torch.int64, device="cuda")
            rope_append(q, k, v, angles, positions, positions + (1 << 42), *caches)
    """,
}

# After a few tokens the fault is launched from a prefill step while others decode.
PROGRAM = """
    import sys, threading
    import torch
    import llava_engine
    from bench.demo_model.scenes import make_scene, render
    from llava_engine import DeviceLost, EngineConfig, PoolConfig, WorkerPool
    from llava_engine.runtime.model_runner import ModelRunner

    {fault}

    pool = WorkerPool(PoolConfig())
    model = llava_engine.get(
        "llava-tiny", EngineConfig(device="cuda:0", kv_cache_mb=256), pool=pool
    )
    on_cpu = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
    picture = render(make_scene(77, 0))
    ask = lambda model, **options: model.describe_image(picture, "Describe the picture.", **options)
    expected = ask(on_cpu).text()
    assert ask(model).text()
    workers = list(pool._state.models[model.registry_key].workers)

    streams = [ask(model, max_new_tokens=200, ignore_eos=True) for _ in range(16)]
    for stream in streams:
        next(stream)
    run = ModelRunner.run
    def faulty(self, step, launched):
        if self._device.type == "cuda":
            fault()
        return run(self, step, launched)
    ModelRunner.run = faulty
    streams.append(ask(model))

    errors = []
    for stream in streams:
        try:
            stream.text()
        except llava_engine.LlavaError as error:
            errors.append(error)
    kinds = sorted({{type(error).__name__ for error in errors}})
    print("ended", len(errors), "of", len(streams), kinds)
    assert errors and set(kinds) == {{"DeviceLost"}}, errors
    assert all(error.__cause__ is not None for error in errors)
    # Some may have been done before the fault was found out; none is left.
    assert len(errors) + sum(stream.finish_reason is not None for stream in streams) >= len(streams)
    state, record = pool._state, pool._state.models[model.registry_key]
    with state.lock:
        assert state.changed.wait_for(lambda: not record.workers, 60)
    for _ in range(3):
        try:
            ask(model).text()
        except DeviceLost as error:
            assert not error.retryable and "new process" in str(error), error
        else:
            raise AssertionError("a lost device answered")
    print("states", sorted({{str(worker.state) for worker in workers}}))
    assert {{str(worker.state) for worker in workers}} == {{"failed"}}
    assert ask(on_cpu).text() == expected
    pool.shutdown(1.0)
    left = [t.name for t in threading.enumerate() if t.name.startswith("llava-")]
    assert not left, left
    print("clean")
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, tuple[subprocess.Popen[str], IO[str]]]]:
    """Every fault's, side by side: each starts for ten seconds, and has a context of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    with ExitStack() as stack:
        started = {}
        for name, fault in FAULTS.items():
            program = textwrap.dedent(PROGRAM).format(fault=textwrap.dedent(fault))
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started[name] = process, log
        yield started


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sticky_error_ends_every_stream_and_the_process_ends_cleanly(
    fault: str, processes: dict[str, tuple[subprocess.Popen[str], IO[str]]]
) -> None:
    process, log = processes[fault]
    try:
        process.wait(240)
    finally:
        log.seek(0)
        said = log.read()
        print(said[-12000:])
    assert "clean" in said.splitlines()
    assert process.returncode == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_have_a_worker_each_and_answer_alike() -> None:
    picture = render(make_scene(77, 0))
    with WorkerPool(PoolConfig()) as pool:
        config = EngineConfig(device="cuda", kv_cache_mb=256)
        model = llava_engine.get("llava-tiny", config, pool=pool)
        streams = [model.describe_image(picture, "Describe the picture.") for _ in range(32)]
        texts = {stream.text() for stream in streams}
        workers = pool.health()["models"][model.registry_key]["workers"]
        assert sorted(worker["device"] for worker in workers) == ["cuda:0", "cuda:1"]
        for device in ("cuda:0", "cuda:1"):
            config = EngineConfig(device=device, kv_cache_mb=256)
            alone = llava_engine.get("llava-tiny", config, pool=pool)
            texts.add(alone.describe_image(picture, "Describe the picture.").text())
            (place,) = {
                worker["device"]
                for worker in pool.health()["models"][alone.registry_key]["workers"]
            }
            assert place == device
        assert len(texts) == 1
