"""`llava-engine bench` as its tests run it."""

from __future__ import annotations

import subprocess
import sys


def command(*options: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command on the CPU, in a process of its own."""
    line = [sys.executable, "-m", "llava_engine.cli", "bench", "--device", "cpu", *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout)
