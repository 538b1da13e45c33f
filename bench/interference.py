"""What do Python threads that compute, in the same process, do to a caller's tokens?

They hold Python's lock whenever they can. One request after the other, by the number of such
threads, through the public names: any model, on a CPU or a GPU.

    python -m bench.interference [--model llava-tiny] [--device cpu] [--threads 0 1 2] [--json PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import llava_engine
from bench.about import keep
from bench.decode import computing_threads
from llava_engine.cli.bench.loops import closed_loop
from llava_engine.cli.bench.metrics import summarize
from llava_engine.cli.bench.workload import QUESTION, Workload, noise

FIGURES = ("completed", "median_ttft_ms", "median_itl_ms", "p99_itl_ms", "output_throughput")


def measure(work: Workload, threads: int, count: int) -> dict[str, Any]:
    """The figures of `count` requests beside so many computing threads."""
    asked = work.ask(1_000 * (1 + threads), count)
    with computing_threads(threads):
        records, seconds = closed_loop(asked, count, 1)
    run = summarize(records, seconds)
    return {"threads": threads, **{name: run[name] for name in FIGURES}}


def main() -> None:
    """Print a line per number of threads; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--requests", type=int, default=2)
    # On a CPU every op of every step waits for the threads: a token takes seconds.
    usual = 16 if torch.cuda.is_available() else 2
    parser.add_argument("--new-tokens", type=int, default=usual)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = llava_engine.get(arguments.model, llava_engine.EngineConfig(device=arguments.device))
    side = model.info.image_size
    work = Workload(model, noise((side, side), seed=0), QUESTION, arguments.new_tokens)
    closed_loop(work.ask(0, 2), 2, 1)  # warms up
    cases = []
    for threads in arguments.threads:
        case = measure(work, threads, arguments.requests)
        cases.append(case)
        print(
            f"beside {threads} threads: first token {case['median_ttft_ms']:.1f} ms, a chunk "
            f"{case['median_itl_ms']:.2f} ms (p99 {case['p99_itl_ms']:.2f})",
            flush=True,
        )
    llava_engine.vision_pool().shutdown()
    keep(arguments, cases)


if __name__ == "__main__":
    main()
