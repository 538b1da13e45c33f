"""Importing bitsandbytes: what of its log and of its errors is passed on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Imports a stand-in for the package, since the real one logs this on some CPUs only.
CODE = """
from llava_engine.errors import KernelsNotBuilt
from llava_engine.quant import bnb
try:
    bnb.functional("nf4")
except KernelsNotBuilt as error:
    print(error)
import logging
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("gemm_4bit_forward, later")
"""


def imported(folder: Path, text: str) -> tuple[str, str]:
    """What is printed where bitsandbytes/__init__.py is `text`: on stdout, on stderr."""
    package = folder / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(text)
    (package / "functional.py").touch()
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{CODE}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_kernel_that_is_not_used_is_not_missed(tmp_path: Path) -> None:
    text = """
import logging
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
log.warning("Something else.")
logging.getLogger("bitsandbytes.cextension").error("No library.")
"""
    expected = "Something else.\nNo library.\ngemm_4bit_forward, later\n"
    assert imported(tmp_path, text) == ("", expected)


def test_its_errors_come_through(tmp_path: Path) -> None:
    out, err = imported(tmp_path, "raise RuntimeError('torn')")
    assert "cannot be loaded into torch" in out
    assert err == "gemm_4bit_forward, later\n"


def test_the_real_one_is_silent() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "gemm_4bit_forward, later\n")
