"""`llava-engine doctor`: what this machine has for the engine, and what would speed it up."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.describe import BadInput, settings
from llava_engine.cli.listing import print_table, size
from llava_engine.cli.where import gpus, kernels_missing


def doctor(args: argparse.Namespace) -> None:
    """Print what is here, one line each, and the advice that follows from it.

    Raises, after that, what every request would end with under the environment's settings.
    """
    found, problem = _findings()
    if args.json:
        print(json.dumps(found))
    else:
        _print(found)
    if problem is not None:
        raise problem


def _print(found: dict[str, Any]) -> None:
    there = [
        f"{gpu['name']}, {size(gpu['free_mb'])} of {size(gpu['total_mb'])} free"
        for gpu in found["gpus"]
    ]
    cuda = found["cuda"] or "no (a CPU build of torch)"
    kernels = "built" if found["kernels"] else "not built"
    offline = ", offline (HF_HUB_OFFLINE)" if found["hub"]["offline"] else ""
    changed = ", ".join(f"{name}={value}" for name, value in found["settings"].items())
    rows = [
        ("llava_engine", found["llava_engine"]),
        ("python", found["python"]),
        ("torch", str(found["torch"])),
        ("cuda in torch", cuda),
        ("gpus", "; ".join(there) or f"none ({found['nvml']})"),
        ("compiled kernels", kernels),
        (
            "memory",
            f"{size(found['memory']['free_mb'])} of {size(found['memory']['total_mb'])} free",
        ),
        ("hub", f"{found['hub']['endpoint']}{offline}"),
        ("hub cache", found["hub"]["cache"]),
        ("settings", changed or ("the defaults" if found["problem"] is None else "wrong")),
        ("formats", ", ".join(found["formats"])),
        *((f"workers of {name}", _fitting(found, name)) for name in found["workers"]),
        *((name, version or "not installed") for name, version in found["packages"].items()),
    ]
    print_table(rows)
    for advice in found["advice"]:
        print(f"- {advice}")


def _findings() -> tuple[dict[str, Any], Exception | None]:
    """What is here, as JSON, and what is wrong with the settings; every probe that fails says so
    instead of ending the command."""
    import importlib.metadata
    import platform

    import huggingface_hub.constants as hub
    import torch

    from llava_engine.pool.sizing import SystemProbe

    packages: dict[str, str | None] = {}
    for name in ("bitsandbytes", "flash-attn", "nvidia-nvimgcodec-cu13", "prometheus-client"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    formats = ["fp8", *(("int8", "nf4") if packages["bitsandbytes"] else ())]
    there, nvml = gpus()
    memory = SystemProbe().host()
    changed: dict[str, Any] = {}
    workers: dict[str, dict[str, int]] = {}
    first_worker_mb: dict[str, dict[str, int]] = {}
    problem: Exception | None = None
    try:
        config, limits = settings()
        changed = {**_changed(config), **_changed(limits)}
        device, workers, first_worker_mb = _workers(config, limits, formats)
        _require(config, device)
    except (BadInput, llava_engine.LlavaError) as error:
        problem = error
    found: dict[str, Any] = {
        "llava_engine": llava_engine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "gpus": there,
        "nvml": nvml,
        "kernels": kernels_missing() is None,
        "memory": {"total_mb": memory.total_mb, "free_mb": memory.free_mb},
        "settings": changed,
        "problem": None if problem is None else str(problem),
        "formats": formats,
        "workers": workers,
        "first_worker_mb": first_worker_mb,
        "packages": packages,
        "hub": {
            "endpoint": hub.ENDPOINT,
            "cache": str(Path(hub.HF_HUB_CACHE)),
            "offline": bool(hub.HF_HUB_OFFLINE),
        },
    }
    return {**found, "advice": _advice(found)}, problem


def _changed(config: llava_engine.EngineConfig | llava_engine.PoolConfig) -> dict[str, Any]:
    """The settings that are not the defaults; of one with a secret in it no more than that."""
    default = type(config)()
    return {
        field.name: getattr(config, field.name) if field.repr else "(hidden)"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }


def _fitting(found: dict[str, Any], model: str) -> str:
    sizes = found["first_worker_mb"][model]
    counts = found["workers"][model].items()
    return ", ".join(f"{count} in {name} (first: {size(sizes[name])})" for name, count in counts)


def _workers(
    config: llava_engine.EngineConfig, limits: llava_engine.PoolConfig, formats: list[str]
) -> tuple[str, dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """The device that a first worker gets; how many workers of each registered model fit now, by
    format, if nothing else runs; and what the first one would take where models run here.

    Raises ModelError for a device that is not there.
    """
    from llava_engine.pool.backend import candidate_devices
    from llava_engine.pool.sizing import (
        HOST,
        SystemProbe,
        estimate_need,
        formats_needed,
        plan_workers,
    )

    probe = SystemProbe()
    host = probe.host()
    devices = candidate_devices(config, probe.gpus(), host)
    device = devices[0].name
    wide = config.dtype == "float32" or (config.dtype == "auto" and device == HOST)
    whole: str = config.quantization or ("32 bits" if wide else "16 bits")
    fraction, wanted = limits.memory_fraction, limits.max_workers
    counts, sizes = {}, {}
    for info in llava_engine.models():
        smaller = formats_needed(info, config, device)
        needs = {whole: estimate_need(info, config, device)}
        needs.update({name: smaller[name] for name in smaller if name in formats})
        counts[info.registry_key] = {
            name: len(
                plan_workers(need, devices, host, {}, fraction=fraction, wanted=wanted).placements
            )
            for name, need in needs.items()
        }
        sizes[info.registry_key] = {name: need.first_mb for name, need in needs.items()}
    return device, counts, sizes


def _require(config: llava_engine.EngineConfig, device: str) -> None:
    """Raise the ModelError of settings under which no model can be loaded on `device`."""
    import torch

    from llava_engine.image.gpu_decode import jpeg_decoder
    from llava_engine.kernels.library import require_kernels
    from llava_engine.pool.backend import require_settings
    from llava_engine.quant import bnb

    there = torch.device(device)
    if config.kernels == "auto":
        require_kernels(there)
    require_settings(config, device)
    jpeg_decoder(config.image_decode, there)
    if config.quantization in ("int8", "nf4"):
        bnb.functional(config.quantization)


def _advice(found: dict[str, Any]) -> list[str]:
    """What would make this machine faster, or larger models fit."""
    advice = []
    if not found["gpus"]:
        advice.append("No GPU was found: models run on the CPU, which suits llava-tiny only.")
    elif not found["cuda_available"]:
        advice.append("There is a GPU, but torch cannot use it: install a CUDA build of torch.")
    elif not found["kernels"]:
        advice.append("Build the CUDA kernels: install the package from source where nvcc is.")
    if found["gpus"] and not found["packages"]["bitsandbytes"]:
        advice.append("Install llava-engine[quant] to run larger models in 4 or 8 bits.")
    if found["gpus"] and not found["packages"]["flash-attn"]:
        advice.append(
            'llava-engine[flash] adds attention="flash_attn" for prompts (not measured yet).'
        )
    if found["gpus"] and not found["packages"]["nvidia-nvimgcodec-cu13"]:
        advice.append(
            'llava-engine[gpu-decode] adds image_decode="gpu": JPEGs several times faster, with '
            "pixels that differ a little."
        )
    if not found["packages"]["prometheus-client"]:
        advice.append("Install llava-engine[metrics] to export the pool's figures.")
    if found["hub"]["offline"]:
        advice.append("HF_HUB_OFFLINE is set: only models that are here already can be used.")
    return advice
