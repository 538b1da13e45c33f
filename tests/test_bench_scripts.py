"""The scripts of bench/ run without a GPU, with llava-tiny or its shapes, in two minutes each.

What only a GPU can answer they leave out; that is for bench/gpu.sh.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_S = 120  # the issue's

CPU = {
    "scheduler": [],
    "load": ["0.03", "--device", "cpu", "--dtype", "float32", "--repeats", "1"],
    "cold_start": ["--model", "llava-tiny", "--device", "cpu", "--repeats", "1"],
    "serving": ["--device", "cpu", "--concurrency", "1,2", "--rate", "5"],
    "prefill": ["--device", "cpu", "--words", "8", "64", "--requests", "4"],
    "prefill_graph": ["32", "100", "--repeats", "2"],
    "interference": ["--device", "cpu", "--threads", "0", "1", "--new-tokens", "2"],
    "fp8": ["--scenes", "1"],
    "quantization": ["--scenes", "1"],
    "kernels": [],
    "vision": ["--pictures", "1"],
    "matmul": [],
    "quant_linear": [],
    "decode": [],
    "decode_step": ["--rows", "1", "4"],
    "preprocess": ["336x336", "1080x1920", "--repeats", "3"],
    "jpeg_decode": ["--repeats", "1"],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )


@pytest.mark.parametrize("script", CPU)
def test_it_runs_and_writes_its_record(script, tmp_path):
    path = tmp_path / "record.json"
    done = run("-m", f"bench.{script}", *CPU[script], "--json", str(path))
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_bytes())
    assert record["commit"] and f"bench.{script}" in record["command"].replace("/", ".")
    assert done.stdout.strip()


def test_every_record_says_what_it_is_of():
    """Commit, GPU, versions and command, or nobody could believe it or make it again."""
    scripts = [path for path in (ROOT / "bench").glob("*.py") if '"--json"' in path.read_text()]
    assert len(scripts) > 12
    for path in scripts:
        text = path.read_text()
        assert "from bench.about import" in text or ('"command"' in text and '"commit"' in text), (
            path.name
        )


def test_servings_record_makes_its_report(tmp_path):
    page, ops = tmp_path / "page.html", ROOT / "bench/results/kernels.json"
    options = ["--device", "cpu", "--requests", "2", "--new-tokens", "4", "--report", str(page)]
    done = run("bench/serving.py", *options, "--ops", str(ops))
    assert done.returncode == 0, done.stderr
    commit = run("-c", "from bench.serving import commit; print(commit())").stdout.strip()
    assert f"<dd>{commit}</dd>" in page.read_text()


def test_the_benchmarks_of_pytest_benchmark_run():
    """Each case once, which measures nothing but shows that it can be measured."""
    done = run(
        "-m", "pytest", "bench/test_cpu.py", "-q", "--benchmark-disable", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout and "passed" in done.stdout
