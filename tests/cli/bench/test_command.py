"""`llava-engine bench` from end to end: what it prints, refuses and writes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.bench_command import command

from llava_engine import cli
from llava_engine.cli.bench import measure
from llava_engine.cli.bench.workload import noise


def test_every_request_makes_exactly_so_many_tokens(ran):
    work = ran.record["workload"]
    assert work["prompt_tokens"] - work["image_tokens"] == 25
    for run in ran.record["runs"]:
        assert (run["completed"], run["failed"]) == (4, 0)
        assert run["total_output_tokens"] == 4 * 9
        assert run["total_input_tokens"] == 4 * work["prompt_tokens"]
        assert run["total_cached_tokens"] == 0  # no two requests have the same picture
        assert run["request_goodput"] == pytest.approx(run["request_throughput"])


def test_every_request_is_in_the_detailed_record(ran):
    for run in ran.record["runs"]:
        assert run["output_lens"] == [9] * 4 and run["errors_by_request"] == [""] * 4
        assert 1e3 * sum(run["ttfts"]) / 4 == pytest.approx(run["mean_ttft_ms"], rel=1e-3)
        gaps = [gap for itls in run["itls"] for gap in itls]
        assert 1e3 * sum(gaps) / len(gaps) == pytest.approx(run["mean_itl_ms"], rel=1e-3)


def test_the_loads_are_those_asked_for(ran):
    loads = [(run["mode"], run.get("max_concurrency"), run.get("request_rate"))
             for run in ran.record["runs"]]  # fmt: skip
    assert loads == [("closed loop", 1, None), ("closed loop", 3, None), ("open loop", None, 20.0)]


def test_a_request_spends_its_time_in_its_stages(ran):
    for run in ran.record["runs"]:
        whole = sum(run["stages_ms"].values())
        assert whole == pytest.approx(run["mean_e2el_ms"], rel=1e-3, abs=0.1)


def test_peers_are_asked_the_same_or_said_to_be_missing(ran):
    found = {peer["name"]: peer for peer in ran.record["peers"]}
    eager = found["transformers eager"]
    assert eager["missing"] is None
    assert eager["outputs"]["compared"] == 4 and eager["outputs"]["different"] == 0
    assert [run["max_concurrency"] for run in eager["runs"]] == [1, 3]
    for run in eager["runs"]:
        assert run["total_output_tokens"] == 9 * run["completed"]
        assert run["total_input_tokens"] == (
            run["completed"] * ran.record["workload"]["prompt_tokens"]
        )
    if importlib.util.find_spec("vllm") is None:
        assert found["vLLM"]["missing"] == "vllm is not installed"
        assert "runs" not in found["vLLM"]


def test_others_print_nothing(ran):
    """Neither the profiler, whose errors on GPUs are worth its other lines, nor transformers."""
    lines = ran.errors.splitlines()
    if torch.cuda.is_available():
        lines = [line for line in lines if not line.startswith("USDT:")]
    assert lines == []


def test_for_people(tmp_path):
    for number in range(2):
        pixels = np.full((40, 60, 3), 90 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    done = command("--requests", "3", "--new-tokens", "4", "--images", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    row = next(line for line in lines if line.startswith("llava-engine"))
    assert row.split()[1] == "1" and len(row.split()) == 9
    assert lines[-1] == "It ran on the CPU."


def test_splits_the_cold_start():
    """The stages are this process's, and with what is between them they make up the whole."""
    began = time.monotonic()
    done = command("--json", "--requests", "1", "--new-tokens", "4")
    took = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    split = record["cold_start_s"]
    whole = split.pop("in all")
    assert list(split)[:3] == ["interpreter", "package", "imports"]
    assert list(split)[-3:] == ["weights", "kv cache, graphs", "first token"]
    assert 0 < whole <= took + 0.02  # a process's start is known to a hundredth of a second
    assert 0.5 * whole <= sum(split.values()) <= whole + 0.01 * len(split)
    assert began < record["first_token_at"] < began + took
    assert record["runs"][0]["completed"] == 1
    assert record["where"]["devices"] == ["cpu"]


def test_writing_random_weights_is_no_part_of_a_cold_start(monkeypatch):
    """Of a process whose checkpoint took three seconds to write, as it seems."""
    write = "llava_engine.cli.bench.write_random_checkpoint"
    original = importlib.import_module("llava_engine.cli.bench").write_random_checkpoint

    def slow(*arguments):
        time.sleep(3)
        original(*arguments)

    monkeypatch.setattr(write, slow)
    began = time.monotonic()
    age = "llava_engine.cli.bench.cold_start.age"
    monkeypatch.setattr(age, lambda: time.monotonic() - began)
    options = ["bench", "--device", "cpu", "--requests", "0", "--random-weights"]
    split = measure(cli._parser().parse_args(options), 0.0)["cold_start_s"]
    assert split["package"] < 2
    assert split["in all"] <= time.monotonic() - began - 3


def test_no_requests_is_the_cold_start_alone():
    done = command("--requests", "0", "--new-tokens", "1")
    lines = done.stdout.splitlines()
    stages = [line.rsplit(maxsplit=2)[0] for line in lines[:-1]]
    assert {"interpreter", "imports", "weights", "first token", "in all"} <= set(stages)
    assert lines[-1] == "It ran on the CPU."


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--device", "tpu"], "device"),
        (["--new-tokens", "0"], "--new-tokens"),
        (["--requests", "-1"], "--requests"),
        (["--kv-cache-mb", "0"], "kv_cache_mb"),
        (["--images", "no-such-folder"], "no-such-folder"),
        (["--prompt-tokens", "3"], "--prompt-tokens"),
        (["--model", "llava-1.5-7b", "--random-weights"], "room"),
        (["--ops", "nowhere.json"], "nowhere.json"),
        (["--report", "nowhere/page.html"], "nowhere"),
        (["--trace", "nowhere/trace.json"], "nowhere"),
        (["--image-size", "1000000x1000000"], "--image-size"),
        (["--trace", "."], "folder"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
    ],
)
def test_bad_input(options, word, capsys, monkeypatch):
    full = type("", (), {"free": 1 << 20})
    monkeypatch.setattr(
        "llava_engine.cli.bench.random_checkpoint.shutil.disk_usage", lambda p: full
    )
    assert cli.main(["bench", "--requests", "1", "--new-tokens", "1", *options]) == 3
    out, err = capsys.readouterr()
    assert out == "" and word in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options",
    [
        ["--concurrency", "0"],
        ["--concurrency", "1,x"],
        ["--concurrency", ""],
        ["--rate", "0"],
        ["--rate", "x"],
        ["--rate", "nan"],
        ["--image-size", "640"],
        ["--goodput", "speed:3"],
        ["--goodput", "ttft:x"],
        ["--goodput", "ttft"],
        ["--peers", "ollama"],
    ],
)
def test_a_wrong_command_line(options, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *options])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert options[0] in err and "invalid _" not in err  # argparse would name the function


def test_random_pictures_are_distinct_and_those_of_the_seed():
    pictures = noise((5, 7), seed=1)
    assert pictures(0).shape == (5, 7, 3)
    assert len({pictures(number).tobytes() for number in range(50)}) == 50
    assert (noise((5, 7), seed=1)(3) == pictures(3)).all()
    assert (noise((5, 7), seed=2)(3) != pictures(3)).any()
