"""What do callers get under load, and what of other engines on the same checkpoint in the same run?

`llava-engine bench` in a fresh process, and its record with the commit beside it: time to first
token, between tokens and to the end, throughput, goodput; closed loops by concurrency and open
loops with Poisson arrivals. All options that are not named here are that command's.

    python bench/serving.py [--json PATH] [--report PATH] [--ops PATH] [--concurrency 1,8,64] ...
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_engine.cli.bench.report import report


def measure(options: list[str]) -> dict[str, Any]:
    """The record of `llava-engine bench` with these options."""
    command = [sys.executable, "-m", "llava_engine.cli", "bench", "--json", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, Any] = json.loads(done.stdout)
    record["command"] = shlex.join(["python", "bench/serving.py", *options])
    record["commit"] = commit()
    return record


def commit() -> str:
    """COMMIT where it is set, else what is checked out here."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Print a line per run; write JSON and the report if asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--ops", type=Path, help="what bench/kernels.py wrote, for the report")
    arguments, options = parser.parse_known_args()
    record = measure(options)
    for run in [*record["runs"], *(r for p in record.get("peers", []) for r in p.get("runs", []))]:
        load = run.get("request_rate", run.get("max_concurrency"))
        print(
            f"{run['backend']:36} {run['mode']:11} {load:>5}: {run['output_throughput']:8.1f} "
            f"tokens/s, first token {run['p50_ttft_ms']:.1f} ms (p99 {run['p99_ttft_ms']:.1f}), "
            f"token {run['p50_tpot_ms'] or 0:.2f} ms"
        )
    for peer in record.get("peers", []):
        print(f"{peer['name']}: {peer['missing'] or peer['outputs']}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.report is not None:
        ops = None if arguments.ops is None else json.loads(arguments.ops.read_bytes())
        arguments.report.write_text(report(record, ops), encoding="utf-8")


if __name__ == "__main__":
    main()
