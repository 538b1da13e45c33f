"""`llava-engine doctor`: what it finds, and what is wrong with the settings."""

from __future__ import annotations

import json
import os

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
    assert f" in nf4 ({sizes['nf4']} MiB)" in row


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
