"""`llava-engine models`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import llava_engine
from llava_engine import cli, demo


def test_models_needs_no_torch(tmp_path):
    code = (
        "import sys; from llava_engine.cli import main; code = main(['models', '--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    listed = {model["name"]: model for model in json.loads(done.stdout)}
    assert {info.registry_key for info in llava_engine.models()} >= set(listed)
    assert not listed["llava-1.5-7b"]["here"]
    assert listed["llava-1.5-7b"]["disk_mb"] is None
    assert listed["llava-1.5-7b"]["device_mb"] == 20_480
    sizes = [listed["llava-1.5-7b"]["quantised"][name]["device_mb"] for name in ("int8", "nf4")]
    assert 20_480 > sizes[0] > sizes[1] > 3_900
    weights = demo.model_dir() / "model.safetensors"
    assert listed["llava-tiny"]["here"]
    assert 0 <= listed["llava-tiny"]["disk_mb"] * 2**20 - weights.stat().st_size < 2**20


def test_models_as_a_table(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["NAME", "HERE"]
    assert {"INT8", "FP8", "NF4"} <= set(lines[0].split())
    assert any(line.split()[:2] == ["llava-tiny", "yes"] for line in lines)
