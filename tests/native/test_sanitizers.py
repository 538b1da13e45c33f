"""The native decode loop and the copies to the device under the compilers' sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import fake_copies
from support.fake_device import PATIENCE, ROOT, SOURCES, compile_native


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize(
    "driver, sources, flags, output",
    [
        # In runs that other threads stop, wake and close.
        ("sanitize.cpp", SOURCES, ("-O1",), "tokens: "),
        ("sanitize_copies.cpp", fake_copies.SOURCES, fake_copies.FLAGS, "copied: "),
    ],
)
def test_sanitizers_find_nothing(
    tmp_path: Path,
    driver: str,
    sources: list[Path],
    flags: tuple[str, ...],
    output: str,
    sanitizer: str,
) -> None:
    """Neither races nor leaks nor what is undefined."""
    program = compile_native(
        tmp_path / "sanitize",
        [ROOT / "tests" / "native" / driver, *sources],
        *flags,
        f"-fsanitize={sanitizer}",
    )
    run = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE * 4)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(output)
