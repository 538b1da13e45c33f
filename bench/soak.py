"""Does anything grow, hang or end wrongly under hours of good, bad, slow and cancelled requests?

llava-tiny in a pool of its own, asked through the public API by threads and by one event loop, over
files, bytes and URLs (bench/soak_requests.py has the kinds, bench/soak_server.py the server, in
another process). Faults, each of which fails the run: an outcome that is not right for its kind, a
stream that has not ended after a minute, a request that the pool has not counted, a KV block held
or a request queued when nothing runs, a connection to a forbidden address, more threads or
descriptors at the end than after warm-up.

Memory: every few seconds the asking is paused until nothing runs, so that what requests hold while
they run is no noise, and bench/soak_figures.py reads RSS, without threads' stacks, and what malloc
has given out. The second is the sharper: a small leak fills holes in pages that are there already
for a long time before RSS shows it. Stacks only ever grow to what their thread once reached, and
the number of threads is judged. malloc has one arena, a fixed mmap threshold, no caches of threads,
and Python's objects (all set by starting anew), and gives back its free pages before each reading,
so the figures are not those of a process with glibc's defaults.

The slopes are least squares over the second half of the run; in the first, caches reach the size
they keep. Standard errors are widened for readings that depend on their neighbours (lag-1
autocorrelation r: (1 + r) / (1 - r) as much variance). "flat" is a 95 % interval wholly under
1 MB/h, "grows" one wholly above, and "undecided" asks for a longer run; only two times "flat"
passes. `--leak 2` keeps 2 MB an hour more in small objects, and must end as "grows".

Before all that, 10,000 streams (`--cancelled`) are asked for and left: at once, in prefill, while
they decode.

`--device cuda` is for a GPU, and for less time: the card's memory is judged instead of the host's,
and at the end a kernel is poisoned in another process (bench/soak_poison.py).

    python -m bench.soak [--minutes 10] [--cancelled 10000] [--device cuda] [--leak MB_PER_HOUR]
                         [--json PATH]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import llava_engine
from bench.soak_figures import Figures, judge_counts, judge_device, judge_memory
from bench.soak_load import Load
from bench.soak_requests import (
    DROPPED,
    MAX_BYTES,
    MAX_UNREAD,
    PICTURES,
    QUERY,
    Kind,
    SlowFile,
    all_kinds,
    picture_name,
    write_pictures,
)
from llava_engine import EngineConfig, PoolConfig, VisionModel, WorkerPool

STUCK_S = 60.0
WARM_UP = 0.5  # of the run
ALLOCATOR = {
    "PYTHONMALLOC": "malloc",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
ROOT = Path(__file__).parent.parent


class Quiet:
    """Readings of the process while nothing runs; the faults that they showed."""

    def __init__(
        self, load: Load, model: VisionModel, pool: WorkerPool, alone: str, figures: Figures
    ) -> None:
        self._load, self._model, self._pool, self._alone = load, model, pool, alone
        self.figures = figures
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
        figures = self.figures
        figures.read()
        print(
            f"{self._load.requests} requests, {figures.rss[-1] / 1e6:.2f} MB, "
            f"{figures.heap[-1] / 1e6:.3f} of malloc's, "
            f"{figures.threads[-1]} threads, {figures.descriptors[-1]} descriptors",
            file=sys.stderr,
        )
        self._load.resume()
        return not held

    def _wait_until_free(self) -> str:
        """What is still held although nothing runs; empty when nothing is."""
        until = time.monotonic() + 10
        while True:
            model = self._pool.health()["models"][self._model.registry_key]
            waiting = model["queue_depth"] + model["paused"] + model["running"]
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


def storm(kinds: list[Kind], count: int) -> tuple[Load, list[str]]:
    """Ask for `count` streams that are cancelled or dropped, and wait for all of them; also returns
    the faults."""
    load = Load([kind for kind in kinds if kind.expected <= {"cancelled", DROPPED}])
    threads = load.start()
    seen, since = 0, time.monotonic()
    while seen < count and time.monotonic() < since + STUCK_S:
        time.sleep(0.01)
        if load.requests > seen:
            seen, since = load.requests, time.monotonic()
    stuck = load.pause(STUCK_S)
    if stuck:
        faulthandler.dump_traceback(all_threads=True)
        return load, [*load.unexpected(), f"streams that did not end: {', '.join(stuck)}"]
    load.stopping = True
    for thread in threads:
        thread.join()
    return load, load.unexpected()


def soak(
    seconds: float, *, cancelled: int = 10_000, device: str = "cpu", leak: float = 0.0
) -> dict[str, Any]:
    """Run it; returns the record for the JSON file."""
    torch.set_num_threads(1)
    figures = Figures(device)
    every = max(1.0, min(5.0, seconds / 36))  # a pause takes up to a fetch's timeout besides
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
            device=device,
            allow_hosts=("127.0.0.1",),
            # A busy machine's slow URLs take a second.
            fetch_timeout=3.0 if device == "cpu" else 1.5,
            # Small, so that all of it is in use, and in turnover, before warm-up is over.
            kv_cache_mb=8,
            image_cache_mb=1,
            pixel_cache_mb=1,
            max_image_bytes=MAX_BYTES,
            max_unread_tokens=MAX_UNREAD,
        )
        model = llava_engine.get("llava-tiny", config, pool=pool)
        # On a GPU an answer may depend on the batch it was computed in.
        kinds = all_kinds(model, directory, port, one_answer=device == "cpu")
        load = Load(kinds, leak)
        alone = f"http://127.0.0.1:{port}/alone/{picture_name(0)}"
        quiet = Quiet(load, model, pool, alone, figures)
        first = (directory / picture_name(0)).read_bytes()
        model.describe_image(first, QUERY).text()
        quiet.own_requests += 1
        quiet.own_requests += fill_crews(model, f"http://127.0.0.1:{port}", first)
        filled = time.monotonic()
        left, faults = storm(kinds, cancelled)
        quiet.own_requests += left.requests
        storm_s = time.monotonic() - filled
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
    faults += load.unexpected() + quiet.faults
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "minutes": (time.monotonic() - began) / 60,
        "leak_mb_per_hour": leak,
        "cancelled_before": {"seconds": storm_s, **sum(left.outcomes.values(), Counter())},
        "requests": load.requests,
        "outcomes": {name: dict(counter) for name, counter in load.outcomes.items()},
        "pool_outcomes": health["outcomes"],
        "forbidden_connections": int(forbidden),
        **judge(figures, began + WARM_UP * seconds, faults),
    }


def judge(figures: Figures, warm_at: float, faults: list[str]) -> dict[str, Any]:
    """What the readings after `warm_at` say, beside the faults that are known; "passed" if all is
    well."""
    warm = sum(1 for at in figures.seconds if at < warm_at)
    counts = {
        what: list(getattr(figures, what))[warm:]
        for what in ("threads", "descriptors", "device_allocated", "device_used")
    }
    seconds = list(figures.seconds)[warm:]
    rss = judge_memory(seconds, list(figures.rss)[warm:])
    heap = judge_memory(seconds, list(figures.heap)[warm:])
    flat = rss["verdict"] == heap["verdict"] == "flat"
    for what in ("threads", "descriptors"):
        faults = faults + judge_counts(what, counts[what])
    if figures.device_used:
        flat = True  # or there is a fault
        for what in ("device_allocated", "device_used"):
            faults = faults + judge_device(what, counts[what])
    return {
        **{
            what: {"after_warm_up": values[0], "most": max(values), "end": values[-1]}
            for what, values in counts.items()
            if values
        },
        "rss": rss,
        "heap": heap,
        "stacks_mb": [round(value / 1e6, 2) for value in figures.stacks],
        "rss_mb": [round(value / 1e6, 2) for value in figures.rss],
        "heap_mb": [round(value / 1e6, 3) for value in figures.heap],
        "faults": faults,
        "passed": not faults and flat,
    }


def poison() -> dict[str, Any]:
    """bench/soak_poison.py's record; a hang is one, too."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.soak_poison"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=STUCK_S,
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "faults": [f"it hung for {STUCK_S:.0f} s"]}
    lines = done.stdout.splitlines()
    if not lines:
        return {"passed": False, "faults": [f"it ended with {done.returncode} and no record"]}
    record: dict[str, Any] = json.loads(lines[-1])
    return {**record, "passed": record["passed"] and done.returncode == 0}


def main() -> None:
    """Print the record, write JSON if asked; exit with 1 unless it passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cancelled", type=int, default=10_000, help="streams, before the rest")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--leak", type=float, default=0, metavar="MB_H", help="keep so much: must fail"
    )
    parser.add_argument("--json", type=Path, help="the record is put beside what is there")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # glibc and Python read these when the process starts.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.execve(
            sys.executable,
            [sys.executable, "-m", "bench.soak", *sys.argv[1:]],
            os.environ | ALLOCATOR | {"PYTHONPATH": path},
        )
    device = "cuda:0" if arguments.device == "cuda" else "cpu"
    record = soak(
        60 * arguments.minutes, cancelled=arguments.cancelled, device=device, leak=arguments.leak
    )
    if arguments.device == "cuda":
        record["poisoned_kernel"] = poison()
        record["passed"] = record["passed"] and record["poisoned_kernel"]["passed"]
    print(json.dumps(record, indent=1))
    if arguments.json:
        about = {
            "commit": commit(),
            "command": " ".join(["python -m bench.soak", *sys.argv[1:]]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "load_average_at_end": os.getloadavg(),
        }
        old = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        old["leaking_control" if arguments.leak else "soak"] = about | record
        arguments.json.write_text(json.dumps(old, indent=1) + "\n")
    sys.exit(not record["passed"])


def commit() -> str:
    """What runs here: COMMIT where it is set (bench/gpu.sh, without a repository), else HEAD."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return head.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
