"""Records to figures, under the names that vLLM's serving benchmark has for them.

ttft: to the first chunk of text. itl: between two chunks. tpot: a request's mean time of a token
after its first. e2el: to the end. All in milliseconds, as the reader saw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from llava_engine.cli.bench.loops import Record

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
GOALS = ("ttft", "tpot", "e2el")
STAGES = ("queue", "picture", "prefill", "decode", "delivery")
"""Of a request: waiting for a worker; reading and preparing the picture; from there to the first
token (waiting for a place in the batch included); to the last token; to the reader's end."""


def summarize(
    records: Sequence[Record], seconds: float, goals: dict[str, float] | None = None
) -> dict[str, Any]:
    """The figures of one run that took `seconds`; failed requests count as such and as no more.

    goals: milliseconds by name of GOALS; request_goodput counts the requests that met them all.
    """
    import numpy as np

    done = [record for record in records if record.error is None]
    samples = latencies_ms(done)
    output = sum(record.output_tokens for record in done)
    total = output + sum(record.prompt_tokens for record in done)
    run: dict[str, Any] = {
        "duration": round(seconds, 6),
        "num_prompts": len(records),
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": total - output,
        "total_output_tokens": output,
        "total_cached_tokens": sum(record.cached_tokens for record in done),
        "request_throughput": len(done) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": total / seconds,
    }
    if goals is not None:
        good = [record for record in done if _meets(record, goals)]
        run["request_goodput"] = len(good) / seconds
    for name, values in samples.items():
        run |= _statistics(name, values)
    errors = sorted({record.error for record in records if record.error is not None})
    if errors:
        run["errors"] = errors
    if done:
        run["stages_ms"] = _mean_stages(done)
        run["quantiles_ms"] = {
            name: _rounded(np.percentile(values, range(101)))
            for name, values in samples.items()
            if values
        }
        run["timeline"] = timeline(sorted(done, key=lambda r: r.latency_s)[(len(done) - 1) // 2])
    return run


def detailed(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Every request by itself, in seconds, as vLLM's benchmark saves them; start_times from the
    first call on, itls between a request's chunks."""
    first = min((record.submitted for record in records), default=0.0)
    return {
        "start_times": [round(record.submitted - first, 6) for record in records],
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [round(record.first_token_s, 6) for record in records],
        "itls": [[round(b - a, 6) for a, b in pairwise(record.arrivals)] for record in records],
        "e2els": [round(record.latency_s, 6) for record in records],
        "errors_by_request": [record.error or "" for record in records],
    }


def latencies_ms(records: Sequence[Record]) -> dict[str, list[float]]:
    """Every value of each latency."""
    return {
        "ttft": [1e3 * record.first_token_s for record in records],
        "tpot": [1e3 * record.token_s for record in records if record.output_tokens > 1],
        "itl": [1e3 * (b - a) for record in records for a, b in pairwise(record.arrivals)],
        "e2el": [1e3 * record.latency_s for record in records],
    }


def stages_ms(record: Record) -> dict[str, float]:
    """What each of STAGES took; one that the request did not reach is left out."""
    ends = [record.stages.get(name) for name in ("queued", "image", "first_token", "total")]
    spans, before = {}, 0.0
    for name, end in zip(STAGES, [*ends, record.latency_s], strict=True):
        if end is not None:
            spans[name] = 1e3 * max(0.0, end - before)
            before = end
    return spans


def timeline(record: Record) -> dict[str, Any]:
    """One request: its stages in milliseconds, and when its chunks came."""
    arrivals = [1e3 * (arrival - record.submitted) for arrival in record.arrivals]
    return {
        "number": record.number,
        "stages_ms": {name: round(ms, 3) for name, ms in stages_ms(record).items()},
        "chunks_ms": _rounded(arrivals),
    }


def _meets(record: Record, goals: dict[str, float]) -> bool:
    reached = {
        "ttft": record.first_token_s,
        "tpot": record.token_s,
        "e2el": record.latency_s,
    }
    return all(1e3 * reached[name] <= goal for name, goal in goals.items())


def _statistics(name: str, values: list[float]) -> dict[str, float | None]:
    """Mean, median, deviation and percentiles; None where there is no value."""
    import numpy as np

    if not values:
        kinds = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
        return {f"{kind}_{name}_ms": None for kind in kinds}
    found: dict[str, float | None] = {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(np.std(values)),
    }
    return found | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def _mean_stages(records: Sequence[Record]) -> dict[str, float]:
    spans = [stages_ms(record) for record in records]
    return {
        name: round(fmean(span[name] for span in spans), 3)
        for name in STAGES
        if all(name in span for span in spans)
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
