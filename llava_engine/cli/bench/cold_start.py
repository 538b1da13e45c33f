"""What this process's own cold start took, stage by stage, from its start to its first token."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.bench.workload import QUESTION, ask


def measure_cold_start(
    model: llava_engine.VisionModel, started: float | None, aside: float
) -> dict[str, Any]:
    """Ask the first request of this process for one token.

    started: what `age` was before the package's own work, if it is known. aside: seconds since
    then that were spent on something else, and do not count. The stages are in seconds;
    first_token_at is of time.monotonic(), for who knows when it started this process.
    """
    from llava_engine.demo import picture_path

    now, asked = age(), time.monotonic()
    now = None if now is None else now - aside
    with ask(model, str(picture_path()), QUESTION, 1) as stream:
        stream.text()
    first = stream.timings.first_token
    assert first is not None
    stages = llava_engine.vision_pool().health()["models"][model.registry_key]["cold_start"]
    spawned = stages.pop("total")
    split: dict[str, float] = {}
    if started is not None and now is not None:
        split |= {"interpreter": started, "package": now - started}
    split |= stages
    split |= {"first token": first - spawned, "in all": (now or 0.0) + first}
    return {
        "cold_start_s": {name: round(seconds, 4) for name, seconds in split.items()},
        "first_token_at": asked + first,
    }


def age() -> float | None:
    """Seconds since this process began, to a hundredth; None where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        passed = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return passed if 0 <= passed < 3600 else None
