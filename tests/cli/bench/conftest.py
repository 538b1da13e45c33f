"""One real run of the command, which several tests look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.bench_command import command

import llava_engine
from llava_engine.pool import pool

RESULTS = Path(llava_engine.__file__).parents[1] / "bench" / "results"


@dataclass(frozen=True)
class Ran:
    """What a run left behind."""

    record: dict[str, Any]
    errors: str
    report: Path
    trace: Path


@pytest.fixture(autouse=True)
def _own_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's pool is a test's own, and ends with it."""
    monkeypatch.setattr(pool, "_own", None)
    yield
    if pool._own is not None:
        pool._own.shutdown(0)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two closed loops and an open one, a peer, a report and a trace."""
    directory = tmp_path_factory.mktemp("bench")
    page, trace = directory / "report.html", directory / "trace.json"
    options = "--concurrency 1,3 --rate 20 --requests 4 --new-tokens 9 --prompt-tokens 25 "
    options += "--random-weights --detailed --kv-cache-mb 128 --goodput ttft:60000,tpot:60000 "
    options += f"--peers eager,vllm --report {page} --trace {trace} --json "
    options += f"--ops {RESULTS / 'kernels.json'}"
    done = command(*options.split())
    assert done.returncode == 0, done.stderr
    return Ran(json.loads(done.stdout), done.stderr, page, trace)
