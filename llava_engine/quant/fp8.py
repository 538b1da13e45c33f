"""Weights in 8 bits (e4m3) with a scale per output.

Either a model has no others (EngineConfig(quantization="fp8")), or prefill's products have them
beside the 16-bit ones and quantise their inputs as well (prefill="fp8").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from llava_engine.errors import UnsupportedModel
from llava_engine.kernels.dequantize import dequantize_fp8
from llava_engine.kernels.fp8 import FP8, quantize_rows
from llava_engine.quant.rows import RowScaled


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight(RowScaled):
    """A matrix whose row i is values[i] * scales[i]. values: float8_e4m3fn."""

    FORMAT: ClassVar[Literal["fp8"]] = "fp8"

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        """Quantise a weight [outputs, inputs], float16, bfloat16 or float32."""
        values = torch.empty_like(weight, dtype=FP8)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        quantize_rows(values, scales, weight)
        return cls(values, scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [outputs, inputs] in `dtype`, rounded once."""
        return dequantize_fp8(self.values, self.scales, dtype)


def fp8_linear(
    x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, inputs] @ weight.T + bias in fp8, [T, outputs] of x's type; in plain torch, anywhere.

    x is quantised row by row. What an fp8 product has to agree with: products of e4m3 numbers,
    summed in float32.
    """
    values = torch.empty_like(x, dtype=FP8)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    quantize_rows(values, scales, x)
    sums = F.linear(values.float(), weight.values.float())
    result = sums * scales.unsqueeze(1) * weight.scales
    return (result if bias is None else result + bias).to(x.dtype)


def require_fp8(device: torch.device, dtype: torch.dtype, *, references: bool) -> None:
    """Raise UnsupportedModel unless a model on `device` in `dtype` can prefill in fp8.

    references: whether every op runs by its torch reference, which knows no limits.
    """
    if references:
        return
    wanted = 'EngineConfig(prefill="fp8")'
    if device.type != "cuda":
        raise UnsupportedModel(
            f"{wanted} needs a GPU, and the model is on {device}; "
            'kernels="reference" imitates it there'
        )
    if dtype == torch.float32:
        raise UnsupportedModel(f"{wanted} is for models in 16 bits, and this one is in float32")
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        raise UnsupportedModel(
            f"{wanted} needs a Hopper GPU (compute capability 9.0); "
            f"{device} has {capability[0]}.{capability[1]}"
        )
