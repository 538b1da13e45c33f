"""Figures of hand-made records against the standard library's statistics and plain arithmetic."""

from __future__ import annotations

import random
import statistics

import pytest

from llava_engine.cli.bench.loops import Record
from llava_engine.cli.bench.metrics import detailed, latencies_ms, stages_ms, summarize, timeline


def record(number: int, submitted: float, arrivals: list[float], **more: object) -> Record:
    """A request whose chunks came so many seconds after its call, a token each."""
    made = Record(number, submitted, arrivals=[submitted + after for after in arrivals])
    made.ended = made.arrivals[-1]
    made.output_tokens, made.prompt_tokens, made.image_tokens = len(arrivals), 20, 12
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def records() -> list[Record]:
    draw = random.Random(3)
    made = []
    for number in range(17):
        times = [draw.uniform(0.01, 0.2)]
        while len(times) < 2 + number % 5:
            times.append(times[-1] + draw.uniform(0.001, 0.02))
        made.append(record(number, draw.uniform(0, 5), times))
    return made


def test_percentiles_are_those_of_the_standard_library(records):
    run = summarize(records, 5.0)
    gaps = [b - a for r in records for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
    expected = {
        "ttft": [r.arrivals[0] - r.submitted for r in records],
        "e2el": [r.arrivals[-1] - r.submitted for r in records],
        "tpot": [(r.arrivals[-1] - r.arrivals[0]) / (len(r.arrivals) - 1) for r in records],
        "itl": gaps,
    }
    for name, seconds in expected.items():
        hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
        found = {
            "mean": statistics.fmean(seconds),
            "median": statistics.median(seconds),
            "std": statistics.pstdev(seconds),
            "p50": hundredths[49],
            "p90": hundredths[89],
            "p99": hundredths[98],
        }
        for kind, value in found.items():
            assert run[f"{kind}_{name}_ms"] == pytest.approx(1e3 * value), (kind, name)
        curve = run["quantiles_ms"][name]
        assert len(curve) == 101
        assert curve[1:100] == pytest.approx([1e3 * value for value in hundredths], abs=1e-3)


def test_throughputs_and_counts(records):
    tokens = sum(len(r.arrivals) for r in records)
    run = summarize(records, 4.0)
    assert (run["completed"], run["failed"], run["num_prompts"]) == (17, 0, 17)
    assert run["total_output_tokens"] == tokens and run["total_input_tokens"] == 17 * 20
    assert run["output_throughput"] == tokens / 4
    assert run["request_throughput"] == 17 / 4
    assert run["total_token_throughput"] == (tokens + 17 * 20) / 4
    assert "request_goodput" not in run and "errors" not in run


def test_the_names_are_vllms(records):
    """As in vLLM's benchmark_serving, whose results other tools read."""
    latencies = [
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ]
    counts = "duration completed total_input_tokens total_output_tokens request_throughput "
    counts += "request_goodput output_throughput total_token_throughput"
    run = summarize(records, 4.0, {"ttft": 100.0})
    assert {*latencies, *counts.split()} <= set(run)


def test_goodput_counts_who_met_every_goal():
    quick, late, slow = (
        record(0, 0.0, [0.010, 0.020, 0.030]),
        record(1, 1.0, [0.300, 0.310, 0.320]),
        record(2, 2.0, [0.010, 0.110, 0.210]),
    )
    short = record(3, 3.0, [0.020])  # no token after the first: its tpot is no reason to fail it

    def good(**goals: float) -> float:
        return 2 * summarize([quick, late, slow, short], 2.0, goals)["request_goodput"]

    assert good(ttft=50) == 3
    assert good(tpot=50) == 3
    assert good(ttft=50, tpot=50) == 2
    assert good(e2el=25) == 1
    assert good(ttft=1) == 0
    assert good(ttft=10.001) == 2


def test_failed_requests_count_as_failed_alone(records):
    failed = record(40, 0.0, [9.0], error="WorkerDied: gone")
    run, without = summarize([*records, failed], 4.0), summarize(records, 4.0)
    assert (run["completed"], run["failed"], run["errors"]) == (17, 1, ["WorkerDied: gone"])
    for name, value in without.items():
        if name not in ("failed", "num_prompts"):
            assert run[name] == value, name
    nothing = summarize([failed], 4.0, {"ttft": 1e9})
    assert nothing["output_throughput"] == nothing["request_goodput"] == 0
    assert nothing["median_ttft_ms"] is None and "timeline" not in nothing


def test_one_token_answers_have_no_time_of_a_token():
    run = summarize([record(0, 0.0, [0.5])], 1.0)
    assert run["median_tpot_ms"] is None and run["median_itl_ms"] is None
    assert run["median_ttft_ms"] == run["median_e2el_ms"] == 500


def test_stages_make_up_the_whole_request():
    one = record(0, 10.0, [0.3, 0.4, 0.5], ended=10.6)
    one.stages = {"queued": 0.05, "image": 0.15, "first_token": 0.29, "total": 0.49}
    spans = stages_ms(one)
    assert spans == pytest.approx(
        {"queue": 50, "picture": 100, "prefill": 140, "decode": 200, "delivery": 110}
    )
    assert sum(spans.values()) == pytest.approx(1e3 * one.latency_s)
    shown = timeline(one)
    assert shown["chunks_ms"] == [300, 400, 500]
    assert shown["stages_ms"] == pytest.approx(spans)


def test_the_time_line_is_of_a_request_in_the_middle(records):
    shown = summarize(records, 1.0)["timeline"]["number"]
    by_latency = sorted(latencies_ms(records)["e2el"])
    assert latencies_ms([records[shown]])["e2el"] == [by_latency[8]]


def test_detailed_records_are_the_requests_themselves(records):
    found = detailed(records)
    first = min(r.submitted for r in records)
    for index, r in enumerate(records):
        start, ttft = found["start_times"][index], found["ttfts"][index]
        assert first + start == pytest.approx(r.submitted, abs=1e-5)
        assert r.submitted + ttft == pytest.approx(r.arrivals[0], abs=1e-5)
        end = r.submitted + ttft + sum(found["itls"][index])
        assert end == pytest.approx(r.arrivals[-1], abs=1e-4)
        assert found["output_lens"][index] == len(r.arrivals)
    assert {len(values) for values in found.values()} == {17}
