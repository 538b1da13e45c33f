"""Does anything grow, hang or end wrongly under hours of good, bad, slow and cancelled requests?

llava-tiny on the CPU in a pool of its own, asked through the public API by threads and by one event
loop, over files, bytes and URLs (bench/soak_requests.py has the kinds, bench/soak_server.py the
server, in another process). Faults, each of which fails the run: an outcome that is not right for
its kind, a stream that has not ended after a minute, a request that the pool has not counted, a KV
block held or a request queued when nothing runs, a connection to a forbidden address, more threads
or descriptors at the end than after warm-up.

Memory: every few seconds the asking is paused until nothing runs; then garbage is collected, the
heap's free pages are given back (malloc_trim) and RSS is read, so that what requests hold while
they run is no noise. One malloc arena, a fixed mmap threshold and no caches of threads (set by
starting anew) keep the allocator's own high-water marks out, so the figure is not that of a process
with glibc's defaults. The slope is least squares over the readings after the first quarter; its
standard error is widened for readings that depend on their neighbours (lag-1 autocorrelation r:
(1 + r) / (1 - r) as much variance). "flat" is a 95 % interval wholly under 1 MB/h, "grows" one
wholly above, and "undecided" asks for a longer run; only "flat" passes. `--leak` keeps 4 KB a
request, and must end as "grows".

    python -m bench.soak [--minutes 10] [--leak] [--json PATH]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

import llava_engine
from bench.soak_requests import (
    MAX_BYTES,
    PICTURES,
    QUERY,
    Kind,
    SlowFile,
    all_kinds,
    picture_name,
    run,
    run_async,
    write_pictures,
)
from llava_engine import EngineConfig, PoolConfig, VisionModel, WorkerPool

LIMIT_MB_H = 1.0
LEAK_BYTES = 4096
STUCK_S = 60.0
THREADS, TASKS = 6, 6
WARM_UP = 0.25  # of the run
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
ROOT = Path(__file__).parent.parent


class Load:
    """The requests in flight, and what became of all others. Thread-safe."""

    def __init__(self, kinds: list[Kind], leak: bool) -> None:
        self.kinds = {kind.name: kind for kind in kinds}
        self.outcomes: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
        self.stopping = False
        self._leaked: list[bytes] | None = [] if leak else None
        self._paused = False
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._deck: list[str] = []

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(counts.total() for counts in self.outcomes.values())

    def begin(self, chance: random.Random) -> Kind | None:
        """A kind to ask now, each as often as any other; None while asking is paused."""
        with self._lock:
            if self._paused:
                return None
            if not self._deck:
                self._deck = chance.sample(list(self.kinds), len(self.kinds))
            name = self._deck.pop()
            self._running[name] += 1
            return self.kinds[name]

    def end(self, kind: Kind, outcome: str) -> None:
        """A request that `begin` gave has ended so."""
        with self._lock:
            self._running[kind.name] -= 1
            self.outcomes[kind.name][outcome] += 1
            if self._leaked is not None:
                self._leaked.append(os.urandom(LEAK_BYTES))

    def pause(self, timeout: float) -> list[str]:
        """Begin nothing more and wait for the rest; returns the kinds that did not end in time."""
        self._paused = True
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            with self._lock:
                left = [name for name, count in self._running.items() if count]
            if not left:
                return []
            time.sleep(0.01)
        return left

    def resume(self) -> None:
        """Go on asking."""
        self._paused = False

    def unexpected(self) -> list[str]:
        """A line for each outcome that is not right for its kind."""
        return [
            f"{name}: {outcome} ({count} times)"
            for name, counts in self.outcomes.items()
            for outcome, count in counts.items()
            if outcome not in self.kinds[name].expected
        ]

    def ask(self, seed: int) -> None:
        """A thread: one request after the other."""
        chance = random.Random(seed)
        while not self.stopping:
            kind = self.begin(chance)
            if kind is None:
                time.sleep(0.01)
            else:
                self.end(kind, run(kind, chance))

    async def _ask_async(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopping:
            kind = self.begin(chance)
            if kind is None:
                await asyncio.sleep(0.01)
            else:
                self.end(kind, await run_async(kind, chance))

    async def _tasks(self) -> None:
        await asyncio.gather(*(self._ask_async(1_000 + index) for index in range(TASKS)))

    def start(self) -> list[threading.Thread]:
        """All that ask; they end soon after `stopping`."""
        threads = [
            threading.Thread(target=self.ask, args=(index,), daemon=True)
            for index in range(THREADS)
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._tasks()), daemon=True))
        for thread in threads:
            thread.start()
        return threads


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Least squares: the slope, and half its 95 % interval, widened for autocorrelation.

    Infinite for fewer than 4 readings.
    """
    count = len(times)
    if count < 4:
        return 0.0, math.inf
    middle, mean = sum(times) / count, sum(values) / count
    spread = sum((t - middle) ** 2 for t in times)
    pairs = list(zip(times, values, strict=True))
    rise = sum((t - middle) * (v - mean) for t, v in pairs) / spread
    rest = [v - mean - rise * (t - middle) for t, v in pairs]
    squares = sum(r * r for r in rest)
    if squares == 0:
        return rise, 0.0
    lag = sum(a * b for a, b in zip(rest, rest[1:], strict=False)) / squares
    lag = min(0.95, max(0.0, lag))
    error = math.sqrt(squares / (count - 2) / spread * (1 + lag) / (1 - lag))
    return rise, 2.0 * error


def judge_memory(seconds: list[float], rss: list[float]) -> dict[str, Any]:
    """The slope of RSS (bytes) in MB an hour, and "flat", "grows" or "undecided"."""
    rise, half = (3600 / 1e6 * value for value in slope(seconds, rss))
    verdict = "undecided"
    if rise + half < LIMIT_MB_H:
        verdict = "flat"
    elif rise - half > LIMIT_MB_H:
        verdict = "grows"
    return {
        "slope_mb_per_hour": rise,
        "half_95_percent_interval": half if math.isfinite(half) else None,
        "limit_mb_per_hour": LIMIT_MB_H,
        "readings": len(seconds),
        "verdict": verdict,
    }


def judge_counts(what: str, counts: list[int]) -> list[str]:
    """A fault if there are more at the end than after warm-up."""
    return (
        [f"{what}: {counts[0]} after warm-up, {counts[-1]} now"] if counts[-1] > counts[0] else []
    )


class Quiet:
    """Readings of the process while nothing runs; the faults that they showed."""

    def __init__(self, load: Load, model: VisionModel, pool: WorkerPool, alone: str) -> None:
        self._load, self._model, self._pool, self._alone = load, model, pool, alone
        self._process = psutil.Process()
        self._trim = ctypes.CDLL(None).malloc_trim
        # Arrays, so that the readings themselves are no slope.
        self.seconds, self.rss = array("d"), array("d")
        self.threads, self.descriptors = array("l"), array("l")
        self.faults: list[str] = []
        self.own_requests = 0

    def read(self) -> bool:
        """Pause, look, go on; False if a stream has not ended."""
        stuck = self._load.pause(STUCK_S)
        if stuck:
            self.faults.append(f"streams that did not end: {', '.join(stuck)}")
            faulthandler.dump_traceback(all_threads=True)
            return False
        # Ends every kept connection, of which there may be any number: the first has the server
        # close them, the second finds them closed.
        for _ in range(2):
            self._model.describe_url(self._alone, QUERY, max_new_tokens=1).text()
            self.own_requests += 1
        held = self._wait_until_free()
        if held:
            self.faults.append(held)
        gc.collect()
        self._trim(0)
        self.seconds.append(time.monotonic())
        self.rss.append(self._process.memory_info().rss)
        self.threads.append(self._process.num_threads())
        self.descriptors.append(self._process.num_fds())
        print(
            f"{self._load.requests} requests, {self.rss[-1] / 1e6:.2f} MB, "
            f"{self.threads[-1]} threads, {self.descriptors[-1]} descriptors",
            file=sys.stderr,
        )
        self._load.resume()
        return not held

    def _wait_until_free(self) -> str:
        """What is still held although nothing runs; empty when nothing is."""
        until = time.monotonic() + 10
        while True:
            model = self._pool.health()["models"][self._model.registry_key]
            waiting = model["queue_depth"] + model["running"]
            counted = sum(model["outcomes"].values())
            asked = self._load.requests + self.own_requests
            blocks = held_blocks(self._pool, self._model.registry_key)
            if not waiting and not blocks and counted == asked:
                return ""
            if time.monotonic() > until:
                return (
                    f"with nothing running: {waiting} requests open, {blocks} KV blocks held, "
                    f"{counted} of {asked} requests counted by the pool"
                )
            time.sleep(0.01)


def held_blocks(pool: WorkerPool, registry_key: str) -> int:
    """KV blocks that sequences hold. No public name says it, so this looks behind one."""
    (runtime,) = {
        worker.backend._runtime  # type: ignore[union-attr]
        for worker in pool._state.models[registry_key].live_workers
    }
    return int(runtime.num_blocks - runtime.num_free_blocks)


def fill_crews(model: VisionModel, base: str, picture: bytes) -> int:
    """Start every thread that a worker may ever have, so that later ones are a leak's."""
    streams = [
        model.describe_url(f"{base}/slow/{picture_name(index % PICTURES)}", QUERY, max_new_tokens=1)
        for index in range(96)
    ]
    streams += [model.describe_image(SlowFile(picture), QUERY, max_new_tokens=1) for _ in range(64)]
    for stream in streams:
        stream.text()
    return len(streams)


def soak(seconds: float, *, leak: bool = False) -> dict[str, Any]:
    """Run it; returns the record for the JSON file."""
    torch.set_num_threads(1)
    every = min(5.0, seconds / 20)
    with tempfile.TemporaryDirectory() as folder, WorkerPool(PoolConfig()) as pool:
        directory = Path(folder)
        write_pictures(directory)
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "soak_server.py"), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        port = int(server.stdout.readline())
        config = EngineConfig(
            device="cpu",
            allow_hosts=("127.0.0.1",),
            fetch_timeout=3.0,  # a busy machine's slow URLs take a second
            # Small, so that all of it is in use, and in turnover, before warm-up is over.
            kv_cache_mb=8,
            image_cache_mb=1,
            pixel_cache_mb=1,
            max_image_bytes=MAX_BYTES,
        )
        model = llava_engine.get("llava-tiny", config, pool=pool)
        load = Load(all_kinds(model, directory, port), leak)
        quiet = Quiet(load, model, pool, f"http://127.0.0.1:{port}/alone/{picture_name(0)}")
        first = (directory / picture_name(0)).read_bytes()
        model.describe_image(first, QUERY).text()
        quiet.own_requests += 1
        quiet.own_requests += fill_crews(model, f"http://127.0.0.1:{port}", first)
        began = time.monotonic()
        threads = load.start()
        alive = True
        while alive and time.monotonic() < began + seconds:
            time.sleep(every)
            alive = quiet.read()
        load.stopping = True
        if alive:
            for thread in threads:
                thread.join()
        forbidden = server.communicate()[0].strip()
        health = pool.health()["models"][model.registry_key]
    if forbidden != "0":
        quiet.faults.append(f"connections that reached a forbidden address: {forbidden}")
    warm = sum(1 for at in quiet.seconds if at < began + WARM_UP * seconds)
    counts = {"threads": list(quiet.threads)[warm:], "descriptors": list(quiet.descriptors)[warm:]}
    faults = load.unexpected() + quiet.faults
    for what, values in counts.items():
        faults += judge_counts(what, values) if values else [f"{what}: no reading after warm-up"]
    memory = judge_memory(list(quiet.seconds)[warm:], list(quiet.rss)[warm:])
    return {
        "minutes": (time.monotonic() - began) / 60,
        "leak_bytes_per_request": LEAK_BYTES if leak else 0,
        "requests": load.requests,
        "outcomes": {name: dict(counter) for name, counter in load.outcomes.items()},
        "pool_outcomes": health["outcomes"],
        "forbidden_connections": int(forbidden),
        **{
            what: {"after_warm_up": values[0], "most": max(values), "end": values[-1]}
            for what, values in counts.items()
            if values
        },
        "rss": memory,
        "rss_mb": [round(value / 1e6, 2) for value in quiet.rss],
        "faults": faults,
        "passed": not faults and memory["verdict"] == "flat",
    }


def main() -> None:
    """Print the record, write JSON if asked; exit with 1 unless it passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--leak", action="store_true", help="keep 4 KB a request: must fail")
    parser.add_argument("--json", type=Path, help="the record is put beside what is there")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # glibc reads these when the process starts.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "bench.soak", *sys.argv[1:]],
            os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT)},
        )
    record = soak(60 * arguments.minutes, leak=arguments.leak)
    print(json.dumps(record, indent=1))
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        about = {
            "commit": commit.stdout.strip(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "load_average_at_end": os.getloadavg(),
        }
        old = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        old["leaking_control" if arguments.leak else "soak"] = about | record
        arguments.json.write_text(json.dumps(old, indent=1) + "\n")
    sys.exit(not record["passed"])


if __name__ == "__main__":
    main()
