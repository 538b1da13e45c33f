"""What does a first token take, by the length of the question, of new pictures and of seen ones?

From the call to the first chunk, one request after the other, as a caller sees it, through the
public names: any model, on a CPU or a GPU. Of a seen picture the question is new.

    python -m bench.prefill [--model llava-tiny] [--device cpu] [--words 8 64 256] [--json PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import llava_engine
from bench.about import keep
from llava_engine.cli.bench.loops import closed_loop
from llava_engine.cli.bench.metrics import summarize
from llava_engine.cli.bench.workload import ask, noise


def measure(model: llava_engine.VisionModel, words: int, seen: bool, count: int) -> dict[str, Any]:
    """The figures of `count` requests after two that warm up."""
    side = model.info.image_size
    pictures = noise((side, side), seed=words)

    def first_token(number: int) -> llava_engine.ChunkStream:
        picture = pictures(0 if seen else 1 + number)
        return ask(model, picture, f"{number}" + " a" * (words - 1), 1)

    closed_loop(lambda number: first_token(count + number), 2, 1)
    records, seconds = closed_loop(first_token, count, 1)
    run = summarize(records, seconds)
    kept = {name: run[name] for name in ("completed", "median_ttft_ms", "p90_ttft_ms")}
    prompt, cached = records[-1].prompt_tokens, records[-1].cached_tokens
    return {"words": words, "seen": seen, "prompt_tokens": prompt, "cached_tokens": cached, **kept}


def main() -> None:
    """Print a line per case; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llava-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--words", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = llava_engine.get(arguments.model, llava_engine.EngineConfig(device=arguments.device))
    cases = []
    for words in arguments.words:
        for seen in (False, True):
            case = measure(model, words, seen, arguments.requests)
            cases.append(case)
            print(
                f"{case['prompt_tokens']:5} tokens, {case['cached_tokens']:4} of them cached: "
                f"first token {case['median_ttft_ms']:.1f} ms (p90 {case['p90_ttft_ms']:.1f})",
                flush=True,
            )
    llava_engine.vision_pool().shutdown()
    keep(arguments, cases)


if __name__ == "__main__":
    main()
