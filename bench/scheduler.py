"""What does one scheduling step cost, and does it depend on how many sequences wait?

No model and no tensor: 64 sequences decode while N others wait; the cost of `schedule` and
`complete` per step is printed for each N. Flat in N is the aim.

    python bench/scheduler.py [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from llava_engine.errors import LlavaError
from llava_engine.runtime.kv_cache import BlockPool
from llava_engine.runtime.scheduler import Scheduler
from llava_engine.runtime.sequence import Sequence
from llava_engine.types import FinishReason, SamplingParams

BATCH = 64
PROMPT = 600
STEPS = 300


class Sink:
    """Takes tokens and does nothing with them."""

    cancelled = False
    room = 1 << 30

    def start(self, cached_tokens: int) -> None: ...
    def put(self, token_id: int) -> None: ...
    def flush(self) -> None: ...
    def finish(self, reason: FinishReason) -> None: ...
    def fail(self, error: LlavaError) -> None: ...


def sequence(index: int) -> Sequence:
    """One request: a picture-sized prompt that shares no prefix with another."""
    return Sequence(
        [-1 - index] * PROMPT, (), SamplingParams(), 10_000, frozenset(), Sink(), seed=index
    )


def measure(waiting: int) -> dict[str, float]:
    """Microseconds per step with `waiting` sequences in the queue."""
    blocks = BATCH * (PROMPT + STEPS + 2 * BATCH) // 64 + BATCH
    plan = Scheduler(
        BlockPool(blocks, 64), max_batch=BATCH, prefill_chunk=1 << 20, max_model_len=4096
    )
    start = time.perf_counter()
    for index in range(BATCH + waiting):
        plan.add(sequence(index))
    added = time.perf_counter() - start
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step = plan.schedule(0.0)
        for entry in step:
            plan.complete(entry, 5)
        times.append(time.perf_counter() - start)
    assert len(plan.running) == BATCH and plan.num_waiting == waiting
    return {
        "waiting": waiting,
        "add_us": 1e6 * added / (BATCH + waiting),
        "step_us_median": 1e6 * statistics.median(times[1:]),
        "step_us_p99": 1e6 * sorted(times[1:])[int(0.99 * len(times)) - 1],
    }


def main() -> None:
    """Print one line per queue length; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(waiting) for waiting in (0, 100, 1_000, 10_000)]
    for row in rows:
        print(
            f"{row['waiting']:>6} waiting: {row['step_us_median']:7.1f} us/step median, "
            f"{row['step_us_p99']:7.1f} p99, {row['add_us']:5.1f} us/add"
        )
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        record = {
            "commit": commit,
            "command": "python " + " ".join(sys.argv),
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "batch": BATCH,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
