"""bench/soak.py in short, and whether its checks see what they are for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from bench.soak import ALLOCATOR, judge
from bench.soak_figures import Figures, judge_counts, judge_device, judge_memory, slope
from bench.soak_load import Load
from bench.soak_requests import Kind

ROOT = Path(__file__).parent.parent


def test_ten_seconds_of_everything(tmp_path: Path) -> None:
    """Memory is not judged: ten seconds are all warm-up."""
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.soak",
            "--minutes",
            str(10 / 60),
            "--cancelled",
            "100",
            "--json",
            str(out),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.exists(), done.stderr
    record = json.loads(out.read_text())["soak"]
    assert record["faults"] == []
    assert record["threads"]["end"] <= record["threads"]["after_warm_up"]
    assert record["descriptors"]["end"] <= record["descriptors"]["after_warm_up"]
    assert record["forbidden_connections"] == 0
    assert all(record["outcomes"].values())  # no kind was left out
    left = record["cancelled_before"]
    assert left["cancelled"] + left["dropped"] >= 100
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("growth", "noise", "verdict"),
    [
        (0.0, 1e4, "flat"),
        (2e6 / 3600, 1e4, "grows"),  # what the leaking control keeps
        (0.8e6 / 3600, 1e4, "flat"),
        (0.0, 5e6, "undecided"),
    ],
)
def test_memory_is_judged_by_the_whole_interval(growth: float, noise: float, verdict: str) -> None:
    seconds = np.arange(100) * 5.0
    rss = 3e8 + growth * seconds + np.random.default_rng(7).normal(0, noise, 100)
    assert judge_memory(list(seconds), list(rss))["verdict"] == verdict


def test_the_slope_is_numpys_and_its_interval_is_never_narrower() -> None:
    chance = np.random.default_rng(3)
    times = np.sort(chance.uniform(0, 500, 60))
    alone = 3.0 * times + chance.normal(0, 50, 60)
    walk = 3.0 * times + np.cumsum(chance.normal(0, 50, 60))
    for values, widened in ((alone, False), (walk, True)):
        (want, _), covariance = np.polyfit(times, values, 1, cov=True)
        rise, half = slope(list(times), list(values))
        assert rise == pytest.approx(want)
        least = 2 * np.sqrt(covariance[0, 0])
        assert half >= least * 0.999
        assert (half > 2 * least) == widened


def test_three_readings_decide_nothing() -> None:
    assert judge_memory([0, 5, 10], [1.0, 1.0, 1.0])["verdict"] == "undecided"


def test_a_descriptor_more_at_the_end_is_a_fault() -> None:
    assert judge_counts("descriptors", [11, 12, 11]) == []
    assert judge_counts("descriptors", [11, 11, 12]) == ["descriptors: 11 after warm-up, 12 now"]


def readings(growth: float) -> Figures:
    """As of a process whose malloc gives out `growth` bytes more each second."""
    figures = Figures("cpu")
    for at in range(100):
        figures.seconds.append(at)
        figures.rss.append(3e8)
        figures.stacks.append(1e6 + 4096 * at)
        figures.heap.append(2e8 + growth * at)
        figures.threads.append(9)
        figures.descriptors.append(9)
    return figures


def test_growth_that_rss_does_not_show_fails_the_run() -> None:
    assert judge(readings(0.0), 50.0, [])["passed"]
    assert not judge(readings(0.0), 50.0, ["a fault"])["passed"]
    grown = judge(readings(2e6 / 3600), 50.0, [])
    assert not grown["passed"]
    assert (grown["rss"]["verdict"], grown["heap"]["verdict"]) == ("flat", "grows")


def in_process(program: str) -> str:
    """What it prints, in a process that starts as the soak does."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_malloc_gives_out_what_is_kept() -> None:
    program = """
        from bench.soak_figures import Figures
        figures = Figures("cpu")
        kept = []
        for _ in range(3):
            kept += [bytes(47) for _ in range(20_000)]
            figures.read()
        print(figures.heap[2] - figures.heap[1])
    """
    given = float(in_process(program))
    # 80 bytes are a bytes object of 47; the list and malloc's headers are the rest.
    assert 20_000 * 80 <= given <= 20_000 * 120


def test_stacks_are_known_by_their_size_and_counted_for_themselves() -> None:
    program = """
        import threading
        from bench.soak_figures import Figures
        figures = Figures("cpu")
        gate, done = threading.Event(), threading.Event()

        def deep(levels):  # of the C stack: max calls back
            return levels and max([levels], key=lambda _: deep(levels - 1))

        def work():
            gate.wait()
            deep(200)
            done.set()
            threading.Event().wait()

        deep(200)  # what of it is no stack is there from now on
        threading.Thread(target=work, daemon=True).start()
        for _ in range(2):
            figures.read()
        gate.set()
        done.wait()
        figures.read()
        print(figures.stacks[2] - figures.stacks[1], figures.rss[2] - figures.rss[1])
    """
    done = in_process(program)
    stacks, rest = map(float, done.split())
    assert stacks >= 200 * 200 and rest < stacks / 2


def test_a_card_whose_memory_never_comes_back_is_a_fault_and_a_jitter_is_none() -> None:
    jitter = [10.0, 12.0] * 10
    assert judge_device("device", jitter) == []
    assert judge_device("device", [*jitter, *(value + 5 for value in jitter)]) != []
    assert judge_device("device", jitter[:5]) != []


def test_an_outcome_that_is_not_right_for_its_kind_is_a_fault_and_so_is_none() -> None:
    def never(chance: random.Random) -> None:
        raise AssertionError

    load = Load([Kind("good", never, frozenset({"stop"}))])  # type: ignore[arg-type]
    chance = random.Random(0)
    for outcome in ("stop", "WorkerDied"):
        kind = load.begin(chance)
        assert kind is not None
        load.end(kind, outcome)
    assert load.unexpected() == ["good: WorkerDied (1 times)"]
    assert load.begin(chance) is not None
    assert load.pause(0.05) == ["good"]  # and it has not ended
    assert load.begin(chance) is None
