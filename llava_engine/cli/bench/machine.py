"""What a run was made on, and with which versions: what a figure needs to be believed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.where import gpus

_LIBRARIES = ("torch", "numpy", "pillow", "tokenizers", "transformers", "vllm")


def machine() -> dict[str, Any]:
    """Processor, memory and GPUs."""
    import psutil

    found, driver = gpus()
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpus": [gpu["name"] for gpu in found],
        "driver": driver if found else None,
    }


def versions() -> dict[str, str]:
    """Of Python, this package, and those libraries that are installed."""
    found = {"python": platform.python_version(), "llava-engine": llava_engine.__version__}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.__version__  # with its build, such as +cu130
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
