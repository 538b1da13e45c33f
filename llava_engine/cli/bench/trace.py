"""A Chrome trace of a few requests: CPU threads and GPU work from torch's profiler, and above them
the requests with their stages and chunks. Open it in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_engine.cli.bench.loops import Record, clock
from llava_engine.cli.bench.metrics import stages_ms

_MARK = "llava-engine bench: clock"
_PROCESS = 1_000_000_000  # no process's id
_WIDTH_US = 1.0
_SETTLE_S = 0.5


def prepare() -> None:
    """Call this before anything else imports torch: its profiler works fully only on the thread
    that loaded it (libkineto's `registerClient`)."""
    import torch.profiler  # noqa: F401


def trace(path: Path, run: Callable[[], Sequence[Record]]) -> None:
    """Write what happens during `run`, which is slower for being watched. Raises OSError."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:
        # Kineto says on stderr when it starts and stops, at a level above that of its errors, which
        # are of GPUs: only without one may all be silenced.
        os.putenv("KINETO_LOG_LEVEL", "6")
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=everywhere) as profiler:
        before = clock()
        with record_function(_MARK):
            pass
        marked = (before + clock()) / 2
        records = run()
        # The answers are there, but worker threads may still be within an op, and torch's
        # profiler may free what such a thread still writes to (pytorch#185741).
        time.sleep(_SETTLE_S)
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        document = json.loads(raw.read_bytes())
    events: list[dict[str, Any]] = document["traceEvents"]
    mark = next(event for event in events if event.get("name") == _MARK)
    zero_us = mark["ts"] + mark["dur"] / 2 - 1e6 * marked
    events += request_events(records, zero_us)
    path.write_text(json.dumps(document))


def request_events(records: Sequence[Record], zero_us: float) -> list[dict[str, Any]]:
    """A row per request with its stages and chunks; `zero_us` is where `clock` was 0."""
    events: list[dict[str, Any]] = [
        _named("process_name", 0, "requests"),
        {"ph": "M", "name": "process_sort_index", "pid": _PROCESS, "args": {"sort_index": -1}},
    ]
    for record in records:
        events.append(_named("thread_name", record.number, f"request {record.number}"))
        at = zero_us + 1e6 * record.submitted
        for stage, ms in stages_ms(record).items():
            events.append(_span(stage, record.number, at, 1e3 * ms))
            at += 1e3 * ms
        for arrival in record.arrivals:
            begin = zero_us + 1e6 * arrival
            events.append({**_span("chunk", record.number, begin, _WIDTH_US), "ph": "i", "s": "t"})
    return events


def _named(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": row, "args": {"name": name}}


def _span(name: str, row: int, begin_us: float, width_us: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "request",
        "name": name,
        "pid": _PROCESS,
        "tid": row,
        "ts": begin_us,
        "dur": width_us,
    }
