"""`llava-engine doctor`: what it finds, and what is wrong with the settings."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
from support.command_line import run

from llava_engine import cli


def test_doctor(capsys):
    import psutil
    import torch

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["cuda_available"] == torch.cuda.is_available()
    assert len(found["gpus"]) >= torch.cuda.device_count()
    assert found["memory"]["total_mb"] <= psutil.virtual_memory().total >> 20
    extras = {"bitsandbytes", "flash-attn", "nvidia-nvimgcodec-cu13", "prometheus-client"}
    assert set(found["packages"]) == extras
    assert found["packages"]["prometheus-client"]
    assert found["formats"] == ["fp8", "int8", "nf4"]
    whole = "16 bits" if found["gpus"] and found["kernels"] else "32 bits"
    assert found["workers"]["llava-tiny"] == {whole: 2, "int8": 2, "fp8": 2, "nf4": 2}
    sizes = found["first_worker_mb"]["llava-1.5-7b"]
    assert sizes[whole] > 2 * sizes["nf4"] > 2 * 4_300
    if not found["gpus"]:
        assert any("GPU" in line for line in found["advice"])
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for line in found["advice"]:
        assert line in text
    row = next(line for line in text.splitlines() if line.startswith("workers of llava-1.5-7b"))
    assert f" in nf4 (first: {sizes['nf4']} MiB)" in row


def test_doctor_without_bitsandbytes(capsys, monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["formats"] == ["fp8"]
    assert set(found["workers"]["llava-1.5-7b"]) - {"16 bits", "32 bits"} == {"fp8"}


def test_doctor_knows_the_hubs_settings(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = json.loads(run("doctor", "--json", env=environment).stdout)
    assert found["hub"]["offline"]
    assert found["hub"]["cache"] == str(tmp_path / "hub")
    assert any("HF_HUB_OFFLINE" in line for line in found["advice"])


@pytest.fixture
def doctor(capsys, monkeypatch):
    """What the command ends with, finds and complains of under settings of the environment."""

    def doctor(**settings: str) -> tuple[int, dict[str, Any], str]:
        for name, value in settings.items():
            monkeypatch.setenv(f"LLAVA_ENGINE_{name}", value)
        code = cli.main(["doctor", "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return doctor


@pytest.mark.parametrize(
    ("settings", "code", "word"),
    [
        ({"NOPE": "1"}, 3, "LLAVA_ENGINE_NOPE names no setting"),
        ({"MEMORY_FRACTION": "7"}, 3, "memory_fraction must be"),
        ({"MAX_BATCH": "many"}, 3, "LLAVA_ENGINE_MAX_BATCH='many'"),
        ({"DEVICE": "cuda:99"}, 4, "cuda:99"),
        ({"DEVICE": "cpu", "ATTENTION": "flash_attn"}, 4, "flash_attn"),
        ({"DEVICE": "cpu", "IMAGE_DECODE": "gpu"}, 4, "image_decode"),
        ({"DEVICE": "cpu", "PREFILL": "fp8"}, 4, "prefill"),
    ],
)
def test_ends_as_a_request_would_under_wrong_settings(settings, code, word, doctor, capsys):
    ended, found, complaint = doctor(**settings)
    assert ended == code and word in found["problem"] and found["python"]
    assert complaint == f"llava-engine: {found['problem']}\n"
    assert cli.main(["describe", "--max-new-tokens", "1"]) == code
    assert capsys.readouterr().err == complaint
    assert cli.main(["doctor"]) == code  # the table comes all the same
    out, err = capsys.readouterr()
    assert "torch" in out and err == complaint


def test_quantising_needs_its_package(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    code, found, _ = doctor(QUANTIZATION="int8", DEVICE="cpu")
    assert code == 4 and "bitsandbytes" in found["problem"]


def test_counts_workers_under_the_settings(doctor):
    code, found, complaint = doctor(DEVICE="cpu")
    assert (code, complaint, found["problem"]) == (0, "", None)
    assert found["settings"] == {"device": "cpu"}
    assert found["workers"]["llava-tiny"]["32 bits"] == 2
    *_, found, _ = doctor(DTYPE="bfloat16", MAX_WORKERS="1")
    assert found["workers"]["llava-tiny"]["16 bits"] == 1
    *_, found, _ = doctor(QUANTIZATION="nf4")
    assert found["workers"]["llava-tiny"] == {"nf4": 1}
    *_, found, _ = doctor(MEMORY_FRACTION="0.00001")
    assert found["workers"]["llava-tiny"] == {"nf4": 0}


def test_tells_no_password(doctor, capsys):
    _, found, _ = doctor(PROXY="http://user:secret@proxy:3128")
    assert found["settings"]["proxy"] == "(hidden)"
    assert "secret" not in json.dumps(found)
    assert cli.main(["doctor"]) == 0
    assert "proxy=(hidden)" in capsys.readouterr().out
