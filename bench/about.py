"""What a record of bench/results/ says of its run: commit, command, machine, versions."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llava_engine.cli.bench.machine import versions

ROOT = Path(__file__).resolve().parent.parent


def about() -> dict[str, Any]:
    """The first fields of a record."""
    return {
        "commit": commit(),
        "command": command(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "versions": {**versions(), "cuda": torch.version.cuda},
        "cores": len(os.sched_getaffinity(0)),
    }


def keep(arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """Write the cases of a script that asks a model through the public API, if --json was given."""
    if arguments.json:
        asked = {"model": arguments.model, "asked_of": arguments.device, "cases": cases}
        arguments.json.write_text(json.dumps({**about(), **asked}, indent=1) + "\n")


def command() -> str:
    """How this script was started, as it is to be started again from the checkout."""
    script = Path(sys.argv[0]).resolve()
    return shlex.join(["python", "-m", f"{script.parent.name}.{script.stem}", *sys.argv[1:]])


def commit() -> str:
    """COMMIT where it is set (bench/gpu.sh, without a repository), else what is checked out."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
