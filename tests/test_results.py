"""What is committed under bench/results/ passed, covers what it is to cover, and fits together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_engine.cli.bench.report import report

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_bytes())
    return record


def test_ten_thousand_mutated_pictures_kept_every_bound() -> None:
    record = read("fuzz.json")
    assert record["pictures"] >= 10_000 and record["broken"] == [] and record["uncommitted"] == []
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"} <= set(record["formats"])
    for found in record["formats"].values():
        assert set(found["outcomes"]) <= {"decoded", "ImageDecodeError", "ImageTooLarge"}
        assert found["ms"] <= 100 and found["mib"] <= 256
    assert max(record["narrow_ms"].values()) < 10
    assert max(record["header_ms"].values()) < 1


def test_the_soak_passed_and_its_leaking_control_did_not() -> None:
    record = read("soak.json")
    soak, control = record["soak"], record["leaking_control"]
    assert soak["passed"] and soak["faults"] == [] and soak["forbidden_connections"] == 0
    assert soak["minutes"] >= 10 and soak["leak_mb_per_hour"] == 0
    left = soak["cancelled_before"]
    assert left["cancelled"] + left["dropped"] >= 10_000
    for what in ("rss", "heap"):
        assert soak[what]["slope_mb_per_hour"] < 1 and soak[what]["verdict"] == "flat"
    assert not control["passed"] and control["heap"]["verdict"] == "grows"
    assert control["faults"] == []  # nothing but the leak


def test_the_gpus_half_passed() -> None:
    soak = read("soak_gpu.json")["soak"]
    assert "H100" in soak["device"] and soak["passed"] and soak["faults"] == []
    for what in ("device_allocated", "device_used"):
        assert soak[what]["end"] <= soak[what]["after_warm_up"]
    poisoned = soak["poisoned_kernel"]
    assert poisoned["passed"] and poisoned["outcomes"]["DeviceLost"] > 0


def test_servings_page_is_that_of_its_record() -> None:
    """`python bench/serving.py --json ... --report ... --ops bench/results/kernels.json`."""
    page = report(read("serving.json"), read("kernels.json"))
    assert (RESULTS / "serving.html").read_text() == page
    loads = [run["max_concurrency"] for run in read("serving.json")["runs"]]
    assert {1, 8, 64} <= set(loads)
