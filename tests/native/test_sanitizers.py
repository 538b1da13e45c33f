"""The native decode loop under the compilers' sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.fake_device import PATIENCE, ROOT, SOURCES, compile_native


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str) -> None:
    """Races, leaks and what is undefined, in runs that other threads stop, wake and close."""
    driver = ROOT / "tests" / "native" / "sanitize.cpp"
    program = compile_native(
        tmp_path / "sanitize", [driver, *SOURCES], "-O1", f"-fsanitize={sanitizer}"
    )
    run = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE * 4)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("tokens: ")
