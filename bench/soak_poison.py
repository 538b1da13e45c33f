"""A kernel writes where no memory is, while many read: does every stream end, and with DeviceLost?

Takes the process's CUDA context along, so bench/soak.py starts it as a process of its own. Prints a
JSON record as its last line.

    python -m bench.soak_poison
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import torch
from PIL import Image

import llava_engine
from bench.soak_requests import LONG, QUERY, outcome_of
from llava_engine import ChunkStream, EngineConfig, PoolConfig, WorkerPool
from llava_engine.kernels.rope_kv import rope_append
from llava_engine.runtime.model_runner import ModelRunner

THREADS, TASKS, LATE, NEVER = 16, 16, 4, 4
PATIENCE_S = 30.0


def poisoned_kernel(device: torch.device) -> None:
    """The engine's own kernel trusts its slots; these are far behind the cache's end."""
    q, k, v = (torch.ones(1, 2, 64, dtype=torch.float16, device=device) for _ in range(3))
    caches = [torch.ones(1, 2, 16, 64, dtype=torch.float16, device=device) for _ in "kv"]
    angles = torch.ones(8, 64, device=device)
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    rope_append(q, k, v, angles, positions, positions + (1 << 42), *caches)


def main() -> None:
    """Readers of all sorts are under way when a prefill step launches the kernel."""
    faulthandler.dump_traceback_later(PATIENCE_S + 20.0, exit=True)
    picture = Image.new("RGB", (160, 160), (200, 200, 190))
    outcomes: Counter[str] = Counter()
    lock, gate = threading.Lock(), threading.Event()

    def ended(error: BaseException | None, stream: ChunkStream) -> None:
        with lock:
            outcomes[str(stream.finish_reason) if error is None else outcome_of(error)] += 1

    def read(stream: ChunkStream, wait: threading.Event | None = None) -> None:
        if wait is not None:
            wait.wait()  # while it is paused, its buffer full
        try:
            stream.text()
        except Exception as error:
            ended(error, stream)
        else:
            ended(None, stream)

    async def read_all(streams: list[ChunkStream]) -> None:
        async def one(stream: ChunkStream) -> None:
            try:
                await stream.atext()
            except Exception as error:
                ended(error, stream)
            else:
                ended(None, stream)

        await asyncio.gather(*map(one, streams))

    pool = WorkerPool(PoolConfig())
    config = EngineConfig(device="cuda:0", kv_cache_mb=256, max_unread_tokens=64)
    model = llava_engine.get("llava-tiny", config, pool=pool)
    model.describe_image(picture, QUERY).text()
    run, poisoned = ModelRunner.run, threading.Event()

    def faulty(self: ModelRunner, *arguments: Any, **options: Any) -> Any:
        if gate.is_set() and not poisoned.is_set():
            poisoned.set()
            poisoned_kernel(torch.device("cuda:0"))
        return run(self, *arguments, **options)

    ModelRunner.run = faulty  # type: ignore[method-assign]

    def ask(**options: Any) -> ChunkStream:
        return model.describe_image(picture, QUERY, **{**LONG, **options})

    left = [ask() for _ in range(NEVER)]
    late = [ask() for _ in range(LATE)]
    streams = [ask(max_new_tokens=800) for _ in range(THREADS + TASKS)]
    for stream in (*left, *late, *streams):
        next(stream)
    threads = [
        *(threading.Thread(target=read, args=(one,), daemon=True) for one in streams[:THREADS]),
        *(threading.Thread(target=read, args=(one, poisoned), daemon=True) for one in late),
        threading.Thread(target=lambda: asyncio.run(read_all(streams[THREADS:])), daemon=True),
    ]
    for thread in threads:
        thread.start()
    gate.set()
    began = time.monotonic()
    read(ask())  # its prefill is the step that is poisoned
    for thread in threads:
        thread.join(max(0.0, began + PATIENCE_S - time.monotonic()))
    seconds = time.monotonic() - began
    for stream in left:
        read(stream)
    while pool.has_workers(model.registry_key) and time.monotonic() < began + PATIENCE_S:
        time.sleep(0.01)
    read(ask())
    expected = 1 + THREADS + TASKS + LATE + NEVER + 1
    faults = [f"{expected - outcomes.total()} streams did not end"] * (outcomes.total() < expected)
    # Short answers may have been complete when the device failed.
    faults += [f"{name}: {n} times" for name, n in outcomes.items() if name != "DeviceLost"
               and name != "length"]  # fmt: skip
    if not outcomes["DeviceLost"]:
        faults.append("no stream ended with DeviceLost")
    pool.shutdown(1.0)
    alive = [one.name for one in threading.enumerate() if one.name.startswith("llava-")]
    faults += [f"threads left: {', '.join(alive)}"] * bool(alive)
    record = {
        "streams": expected,
        "outcomes": dict(outcomes),
        "seconds_to_the_last_end": seconds,
        "faults": faults,
        "passed": not faults,
    }
    print(json.dumps(record), flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
