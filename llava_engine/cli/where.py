"""Where a model runs, for people: the device, the kernels, and why no GPU if there is one."""

from __future__ import annotations

from typing import Any

import llava_engine
from llava_engine.cli.listing import size


def where(model: llava_engine.VisionModel) -> dict[str, Any] | None:
    """The devices of a model's workers and what runs there, as JSON; None while it has none.

    unused_gpu: the GPU that the model could have had, and why it has it not, in a line; or None.
    memory_mb: what the pool holds, which is this model's where there is no other.
    """
    health = llava_engine.vision_pool().health()
    known = health["models"].get(model.registry_key)
    devices = sorted({worker["device"] for worker in known["workers"]}) if known else []
    if not devices:
        return None
    on_gpu = devices != ["cpu"]
    return {
        "devices": devices,
        "names": [_name(device) for device in devices],
        "kernels": "compiled" if on_gpu and model.config.kernels == "auto" else "torch",
        "quantization": model.config.quantization,
        "memory_mb": health.get("total_memory_mb"),
        "unused_gpu": _unused_gpu() if not on_gpu and model.config.device == "auto" else None,
    }


def sentence(found: dict[str, Any]) -> str:
    """What `where` found, in a line."""
    format = ""
    if found["quantization"] is not None:
        format = f", in {found['quantization']} ({size(found['memory_mb'])})"
    if found["devices"] == ["cpu"]:
        unused = found["unused_gpu"]
        return f"ran on the CPU{format}" + (f"; {unused}" if unused else "")
    pairs = zip(found["devices"], found["names"], strict=True)
    places = " and ".join(f"{device} ({name})" for device, name in pairs)
    return f"ran on {places}, {found['kernels']} kernels{format}"


def gpus() -> tuple[list[dict[str, Any]], str]:
    """The GPUs as NVML reports them, and NVML's own word on it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # NVMLError is made by the module that may be missing
        return [], str(error)
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = str(pynvml.nvmlDeviceGetName(handle))
            found.append(
                {"name": name, "total_mb": memory.total >> 20, "free_mb": memory.free >> 20}
            )
        return found, f"driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError as error:
        return [], str(error)
    finally:
        pynvml.nvmlShutdown()


def kernels_missing() -> str | None:
    """Why the compiled kernels cannot run on the first GPU; None if they can."""
    import importlib
    import pkgutil

    import torch

    from llava_engine import kernels

    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    try:
        kernels.library.require_kernels(torch.device("cuda"))
    except llava_engine.KernelsNotBuilt as error:
        return str(error)
    return None


def _name(device: str) -> str:
    """The driver's name of "cuda:N", which torch passes on."""
    if device == "cpu":
        return "CPU"
    import torch

    return str(torch.cuda.get_device_name(device))


def _unused_gpu() -> str | None:
    found, _ = gpus()
    if not found:
        return None
    import torch

    if torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch cannot use it"
    else:
        missing = kernels_missing()
        if missing is None:
            return None
        reason = missing.partition(";")[0]  # the rest is what to do about it, as `doctor` has it
    return f"{found[0]['name']} is not used: {reason}"
