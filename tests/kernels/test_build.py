"""setup.py's CUDA build: what it says where it cannot build, and what csrc/ registers."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_engine.kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"LLAVA_BUILD_CUDA": "0"}, "LLAVA_BUILD_CUDA=0"), ({"NVCC": "no-such-nvcc"}, "nvcc")],
    ids=["switched-off", "no-nvcc"],
)
def test_a_build_that_cannot_be_says_so_and_succeeds(variables: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_csrc"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("CUDA kernels not built: ") and said in line


def test_bindings_register_every_op_that_is_declared() -> None:
    for module in pkgutil.iter_modules(llava_engine.kernels.__path__):
        importlib.import_module(f"llava_engine.kernels.{module.name}")
    registered = re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "bindings.cpp").read_text())
    declared = {
        name.removeprefix("llava_engine::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("llava_engine::")
    }
    assert len(registered) == len(declared) and set(registered) == declared
