"""`llava-engine bench`: what a cold start takes, stage by stage, and what a warm request does.

The cold start is this process's own, from its beginning to its first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.describe import BadInput, engine_config
from llava_engine.cli.listing import print_table
from llava_engine.cli.where import sentence, where

_SIDES = (480, 640)  # of the warm requests' pictures


def bench(args: argparse.Namespace) -> None:
    """Print the split of the cold start and the medians of the warm requests."""
    record = _measure(args)
    if args.json:
        print(json.dumps(record))
        return
    split = record["cold_start_s"]
    print_table([(name, f"{seconds:8.3f} s") for name, seconds in split.items()])
    found = record["where"]
    if found is not None and found["devices"] != ["cpu"]:
        print("The CUDA context is made beside the imports: that time is in both.")
    warm = record["warm"]
    if warm is not None:
        print(
            f"{warm['requests']} warm requests, a new picture each: first token "
            f"{warm['first_token_ms']:.1f} ms, {warm['token_ms']:.2f} ms a token."
        )
    if found is not None:
        print(f"It {sentence(found)}.")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from llava_engine.demo import picture_path

    started = _age()
    model = llava_engine.get(args.model, engine_config(args))
    age, asked = _age(), time.monotonic()
    first, _, _ = _ask(model, str(picture_path()), args.max_new_tokens)
    health = llava_engine.vision_pool().health()["models"][model.registry_key]
    stages = health["cold_start"]
    spawned = stages.pop("total")
    split: dict[str, float] = {}
    if started is not None and age is not None:
        split |= {"interpreter": started, "package": age - started}
    split |= stages
    split |= {"first token": first - spawned, "in all": (age or 0.0) + first}
    return {
        "model": args.model,
        "where": where(model),
        "cold_start_s": {name: round(seconds, 4) for name, seconds in split.items()},
        # Of time.monotonic(), for who knows when it started this process.
        "first_token_at": asked + first,
        "warm": _warm(model, args.requests, args.max_new_tokens) if args.requests > 0 else None,
    }


def _warm(model: llava_engine.VisionModel, requests: int, tokens: int) -> dict[str, Any]:
    """Medians of requests with pictures that no other had, one after the other."""
    import numpy as np

    random = np.random.default_rng()
    first_tokens, rates = [], []
    for number in range(1 + requests):
        picture = random.integers(0, 256, (*_SIDES, 3), dtype=np.uint8)
        first, total, sampled = _ask(model, picture, tokens)
        if number:  # the first one still meets what is set up at its first use
            first_tokens.append(first)
            rates.append((total - first) / max(1, sampled - 1))
    return {
        "requests": requests,
        "first_token_ms": round(1e3 * statistics.median(first_tokens), 3),
        "token_ms": round(1e3 * statistics.median(rates), 3),
    }


def _ask(
    model: llava_engine.VisionModel, picture: llava_engine.ImageInput, tokens: int
) -> tuple[float, float, int]:
    """Seconds to the first and to the last token, and how many there were."""
    try:
        stream = model.describe_image(
            picture, "Describe the picture.", max_new_tokens=tokens, temperature=0, ignore_eos=True
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    with stream:
        stream.text()
    times = stream.timings
    assert times.first_token is not None and times.total is not None
    return times.first_token, times.total, stream.usage.completion_tokens


def _age() -> float | None:
    """Seconds since this process began, to a hundredth; None where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return age if 0 <= age < 3600 else None
