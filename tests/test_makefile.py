"""`make demo` builds the CUDA kernels where that is of use, and describes the picture anyhow.

Everything it calls is a script here that notes how it was called: no GPU and no compiler is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="there is no make here")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def demo(folder: Path, *, gpus: str | None, nvcc: bool, built: bool, builds: bool = True) -> str:
    """What `make demo` prints; its python and llava-engine print what they are called with."""
    bin, tools = folder / "venv" / "bin", folder / "tools"
    script(bin / "python", f'echo "python $* for $LLAVA_CUDA_ARCHS"; exit {0 if builds else 1}')
    script(bin / "llava-engine", 'echo "llava-engine $*"')
    for made in (".created", ".installed"):
        (folder / "venv" / made).touch()
    if gpus is not None:
        script(tools / "nvidia-smi", f"printf '{gpus}'")
    if nvcc:
        script(tools / "nvcc", "")
    kernels = folder / "_kernels.so"
    if built:
        kernels.touch()
    done = subprocess.run(
        [
            str(MAKE),
            "demo",
            f"VENV={folder / 'venv'}",
            f"KERNELS={kernels}",
            f"NVCC={tools / 'nvcc'}",
        ],
        cwd=ROOT,
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("llava-engine describe\n")
    return done.stdout


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [("9.0\\n", "90a"), ("8.0\\n8.0\\n", "80"), ("9.0\\n8.6\\n", "86 90a"), ("7.5\\n8.9\\n", "89")],
)
def test_kernels_are_built_for_the_gpus_that_are_there(
    gpus: str, archs: str, tmp_path: Path
) -> None:
    said = demo(tmp_path, gpus=gpus, nvcc=True, built=False)
    assert f"python setup.py --quiet build_csrc for {archs}\n" in said
    assert f"({archs})" in said


@pytest.mark.parametrize(
    ("gpus", "nvcc", "built"),
    [
        (None, True, False),  # no GPU
        ("", True, False),  # a driver without one
        ("7.5\\n", True, False),  # one that csrc/ is not written for
        ("9.0\\n", False, False),
        ("9.0\\n", True, True),
    ],
)
def test_nothing_is_built_where_it_would_be_of_no_use(
    gpus: str | None, nvcc: bool, built: bool, tmp_path: Path
) -> None:
    said = demo(tmp_path, gpus=gpus, nvcc=nvcc, built=built)
    assert "build_csrc" not in said and "Building" not in said


def test_a_build_that_fails_leaves_the_cpu(tmp_path: Path) -> None:
    said = demo(tmp_path, gpus="9.0\\n", nvcc=True, built=False, builds=False)
    assert "could not be built: the demo runs on the CPU" in said
