"""The command as a process of its own."""

from __future__ import annotations

import subprocess
import sys

COMMAND = [sys.executable, "-m", "llava_engine.cli"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options
    )
    if done.returncode != 70:
        assert "Traceback" not in done.stderr
    return done
