"""README says what the repository's files and commands say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.pool_fakes import FakeProbe, error_of, make_pool

import llava_engine
from bench import readme
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


def test_the_figures_are_what_the_results_say() -> None:
    """`python bench/readme.py` mends it."""
    assert readme.with_section(README, readme.section()) == README
    assert (ROOT / "bench/results" / readme.PLOT).read_text() == readme.plot()


@pytest.mark.parametrize(
    ("name", "path", "shown"),
    [
        ("decode.json", ["token_ms"], "9.87 ms, p99"),
        ("decode.json", ["tokens_per_s_64"], "| 10 tokens/s |"),
        ("decode.json", ["first_token_ms"], "| 9.9 ms |"),
        ("decode.json", ["commit"], "at 9.8700"),
        ("cold_start.json", ["medians_s", "imports"], "of which 9.9 s import"),
        ("decode_step.json", ["steps", 1, "of_floor"], "to 987 % of its own floor"),
    ],
)
def test_another_result_is_another_readme(name, path, shown, tmp_path) -> None:
    for file in (ROOT / "bench/results").glob("*.json"):
        shutil.copy(file, tmp_path)
    assert shown not in README
    record = json.loads((tmp_path / name).read_text())
    *way, last = path
    place = record
    for step in way:
        place = place[step]
    place[last] = "9.870000" if last == "commit" else 9.87
    (tmp_path / name).write_text(json.dumps(record))
    assert shown in readme.section(tmp_path)


def test_peers_are_in_the_readme_as_far_as_they_agree(tmp_path) -> None:
    for file in (ROOT / "bench/results").glob("*.json"):
        shutil.copy(file, tmp_path)

    def run(load: int, tokens: float) -> dict[str, object]:
        return {
            "max_concurrency": load,
            "output_throughput": tokens,
            "median_ttft_ms": 17.4,
            "median_tpot_ms": 4.625,
            "mean_tpot_ms": 4.625,
            "std_tpot_ms": 0.1,
        }

    def peer(name: str, different: int, **more: object) -> dict[str, object]:
        outputs = {"compared": 2, "identical": 0, "near_ties": 0, "different": different}
        runs = {"version": "1.0", "stopped": None, "outputs": outputs, "runs": [run(1, 321.0)]}
        return {"name": name, "missing": None, **runs, **more}

    stopped = "8 at once failed with OutOfMemoryError: no room"
    rough = {"std_tpot_ms": 2.0, "completed": 4, "quantiles_ms": {"tpot": [3.0, 4.6, 9.2]}}
    peers = [
        peer("delta", 0, runs=[run(1, 98.7) | rough]),
        peer("alpha", 0, stopped=stopped),
        peer("beta", 1),
        {"name": "gamma", "missing": "not installed"},
    ]
    record = {"commit": "0123456789", "runs": [run(1, 205.4), run(8, 1100.2)], "peers": peers}
    (tmp_path / "serving.json").write_text(json.dumps(record))
    text = readme.section(tmp_path)
    assert "| llava-engine | 205, 17 ms, 4.62 ms | 1100, 17 ms, 4.62 ms |" in text
    assert "| alpha 1.0 | 321, 17 ms, 4.62 ms |  |" in text
    assert "| beta" not in text and "beta gave other answers" in text
    assert f"alpha: {stopped}." in text
    assert "Of 6 answers" in text and "0 part at a near tie, 1 differ." in text
    assert "delta is rough at 1 at once: its 4 requests took 3 to 9 ms a token." in text
    assert "alpha is rough" not in text
    assert "gamma was not measured: not installed." in text
    assert "nothing is claimed" not in text
    drawn = ElementTree.fromstring(readme.plot(tmp_path))
    words = " ".join(drawn.itertext())
    assert "alpha, 1 at once" in words and "beta" not in words


def test_the_plot_is_a_picture_by_itself() -> None:
    """XML with colours of its own, that asks for nothing."""
    text = (ROOT / "bench/results" / readme.PLOT).read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "href" not in text and "url(" not in text and "<script" not in text


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


def test_what_is_said_of_device_cuda_without_a_gpu() -> None:
    """The class itself, not the KernelsNotBuilt of a machine that has a GPU."""
    assert "requests end with `ModelError`" in README and "| `ModelError` |" in README
    with make_pool(FakeProbe()) as pool:
        for device in ("cuda", "cuda:7"):
            model = llava_engine.get("llava-tiny", EngineConfig(device=device), pool=pool)
            error = error_of(model.describe_image(picture_path(), "What?"))
            assert type(error) is llava_engine.ModelError


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
