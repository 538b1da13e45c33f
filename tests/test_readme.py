"""README says what the repository's files and commands say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import llava_engine
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.demo import picture_path
from llava_engine.pool.sizing import estimate_need
from llava_engine.registry import lookup

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quoted_answer_is_what_the_demo_says() -> None:
    quoted = " ".join(line.removeprefix("> ") for line in README.splitlines() if line[:2] == "> ")
    pool = WorkerPool(PoolConfig())
    try:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu"), pool=pool)
        answer = model.describe_image(picture_path(), "Describe the picture.").text()
    finally:
        pool.shutdown(0)
    assert answer.strip() == quoted


def test_the_demo_models_figures_are_those_of_its_evaluation() -> None:
    table = json.loads((ROOT / "bench/results/demo_model.json").read_text())["table"]
    shown = re.findall(r"([\d.]+) % of the closed\s+questions|([\d.]+) % of its\s+descr", README)
    closed, described = (float(a or b) for a, b in shown)
    assert closed == table["all closed"]["percent"] >= 95
    assert described == table["describe"]["percent"] >= 90


def test_the_gpu_figures_are_those_of_the_last_run() -> None:
    record = json.loads((ROOT / "bench/results/decode.json").read_text())
    found = re.search(r"first token ([\d.]+) ms, ([\d.]+) ms a token, (\d+) tokens/s", README)
    assert found is not None
    assert found.group(1) == f"{record['first_token_ms']:.1f}"
    assert found.group(2) == f"{record['token_ms']:.2f}"
    assert found.group(3) == f"{record['tokens_per_s_64']:.0f}"
    assert f"{record['floor_ms']:.2f} ms a token" in README
    assert f"at {100 * record['of_floor']:.0f} % of what the memory allows" in README
    busy = record["beside_two_computing_threads"]
    text = " ".join(README.split())
    both = f"p99 {busy['token_ms_p99']:.2f} ms a token beside them, {record['token_ms_p99']:.2f} ms"
    assert both in text
    assert f"({busy['reader_token_ms']:.0f} ms a token)" in text
    assert f"({busy['first_token_ms'] / 1e3:.0f} s to the first token)" in text
    steps = json.loads((ROOT / "bench/results/decode_step.json").read_text())["steps"]
    shares = sorted(round(100 * step["of_floor"]) for step in steps if step["rows"] > 1)
    assert f"at {shares[0]} to {shares[-1]} % of its own floor" in README


def test_the_cold_starts_figures_are_those_of_the_last_run() -> None:
    record = json.loads((ROOT / "bench/results/cold_start.json").read_text())
    text, stages = " ".join(README.split()), record["medians_s"]
    assert f"first token after {record['start_to_first_token_s']:.1f} s" in text
    assert f"the weights, {record['gigabytes']:.1f} GB, are in the page cache" in text
    assert f"{stages['weights']:.1f} s of that load them" in text
    assert f"{stages['imports']:.1f} s import torch" in text


def test_what_is_said_of_fp8_was_measured() -> None:
    lines = json.loads((ROOT / "bench/results/matmul.json").read_text())["ours_then_cublas"]
    for line in lines:
        assert 0.45 < line["fp8_ms_32_layers"] / line["cublas_ms_32_layers"] < 0.6, line
    tiny = json.loads((ROOT / "bench/results/fp8_tiny.json").read_text())["llava_tiny"]
    assert tiny["same_text_fp8"] == 1


def test_what_is_said_of_quantised_answers_was_measured() -> None:
    tiny = json.loads((ROOT / "bench/results/quantization.json").read_text())["llava_tiny"]
    formats, asked = tiny["formats"], tiny["questions"]
    assert formats["int8"]["same_text"] == formats["fp8"]["same_text"] == 1
    assert round((1 - formats["nf4"]["same_text"]) * asked) == 2
    assert f"nf4 two of {asked:,}" in " ".join(README.split())
    shares = {line["right"]["all closed"]["percent"] for line in formats.values()}
    said = f"of the closed questions {shares.pop():.2f} % are answered right in each format"
    assert not shares and said in " ".join(README.split())


def test_the_sizes_are_those_that_are_planned_with() -> None:
    for name, column in (("llava-tiny", 0), ("llava-1.5-7b", 1), ("llava-1.5-13b", 2)):
        for quantization in ("int8", "nf4"):
            config = EngineConfig(quantization=quantization)
            need = estimate_need(lookup(name), config, "cuda:0")
            row = re.search(rf'`quantization="{quantization}"`.*?first, further \|(.*?)\n', README)
            assert row is not None
            first, further = row.group(1).split("|")[column].strip().split(", ")
            for mb, said in ((need.first_mb, first), (need.next_mb, further)):
                number = float(said.split()[0])
                gigabytes = further.endswith("GiB")
                assert abs(number - (mb / 1024 if gigabytes else mb)) <= (0.06 if gigabytes else 1)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert len(local) > 3
    for link in local:
        assert (ROOT / link).exists(), link


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
