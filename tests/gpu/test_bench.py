"""`llava-engine bench` on a GPU: peers agree, and the trace has the GPU's work under requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The command's record and its trace."""
    trace = tmp_path_factory.mktemp("bench") / "trace.json"
    options = "--random-weights --device cuda --concurrency 1,8 --new-tokens 32 --requests 8 "
    options += f"--peers eager --trace {trace} --json"
    done = subprocess.run(
        [sys.executable, "-m", "llava_engine.cli", "bench", *options.split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), trace


def test_the_peer_gives_the_same_answers(ran):
    record, _ = ran
    assert [run["total_output_tokens"] for run in record["runs"]] == [8 * 32, 8 * 32]
    (eager,) = record["peers"]
    assert eager["missing"] is None
    assert eager["outputs"]["compared"] == 4 and eager["outputs"]["different"] == 0


def test_the_gpus_work_is_in_the_trace(ran):
    _, path = ran
    events = json.loads(path.read_bytes())["traceEvents"]
    requests = [event for event in events if event.get("cat") == "request" and event["ph"] == "X"]
    begin = min(event["ts"] for event in requests)
    end = max(event["ts"] + event["dur"] for event in requests)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    inside = [event for event in kernels if begin <= event["ts"] <= end]
    # Four requests: at least a prefill each, and sixteen steps of four layers.
    assert len(inside) > 100 and len(inside) > 0.9 * len(kernels)
    names = {event.get("name") for event in events}
    assert {"llava_engine: step", "llava_engine: decode"} <= names
