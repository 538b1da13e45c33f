"""Checkpoints that transformers saves quantised by bitsandbytes, and bitsandbytes' own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

WIDE_ENOUGH: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192}
"""text_config whose products are in whole blocks of NF4; the vision tower's are not."""
VISION_WIDE_ENOUGH: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""vision_config for the same."""
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def save_quantised(
    plain: Path, directory: Path, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> None:
    """What transformers saves of the checkpoint `plain` under BitsAndBytesConfig(**settings)."""
    model = LlavaForConditionalGeneration.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(directory)
    for file in plain.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (directory / file.name).write_bytes(file.read_bytes())


def write_quantised(plain: Path, directory: Path, format: str) -> None:
    """What save_quantised saves of the decoder's matrices, without transformers and accelerate."""
    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight") or "vision" in name:
            tensors[name] = tensor
        elif format == "int8":
            values, scb, _ = bnb.int8_vectorwise_quant(tensor.half())
            tensors[name], tensors[name.replace("weight", "SCB")] = values, scb
        else:
            codes, state = bnb.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
            tensors[name] = codes
            tensors.update(
                {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
            )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **WAYS[format]}
    (directory / "config.json").write_text(json.dumps(config))


def dequantised(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight of a saved file in `dtype`, by bitsandbytes; those that are not quantised as
    they are."""
    tensors = load_file(file)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix("weight")
        if f"{module}SCB" in tensors and name.endswith("weight"):
            whole = bnb.int8_vectorwise_dequant(tensor, tensors[f"{module}SCB"])
            found[name] = whole.to(dtype)
        elif f"{name}.absmax" in tensors:
            state = {
                key.removeprefix(f"{name}."): part
                for key, part in tensors.items()
                if key.startswith(f"{name}.")
            }
            quant_state = bnb.QuantState.from_dict(state, torch.device("cpu"))
            quant_state.dtype = dtype
            # As one row: its kernel for the CPU errs where rows are no whole blocks.
            shape, quant_state.shape = quant_state.shape, [quant_state.shape.numel()]
            found[name] = bnb.dequantize_4bit(tensor, quant_state).view(shape)
        elif tensor.dtype.is_floating_point and ".weight." not in name and "SCB" not in name:
            found[name] = tensor.to(dtype)
    return found
