"""Rows in 8 bits (e4m3), each with its own scale: what the fp8 products of prefill multiply.

A row's largest absolute value becomes 448, the largest of e4m3, so nothing overflows; a row that
holds NaN or infinity becomes one whose products are NaN.
"""

from __future__ import annotations

import torch

from llava_engine.kernels.library import define
from llava_engine.kernels.norm import rms_norm

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
TINY = 2.0**-100
"""A row without anything as large counts as zero: the reciprocal of its scale could overflow."""


def quantize_rows(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> None:
    """out * scales = x, as nearly as e4m3 has it.

    out: float8_e4m3fn [T, n]. scales: float32 [T], the largest absolute value of the row over 448,
    and 1 for a row of zeros. x: [T, n], float16, bfloat16 or float32. An element is
    x * (1 / scale) in float32, rounded to nearest even.
    """
    _quantize_rows(out, scales, x)


def rms_norm_fp8(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """quantize_rows of rms_norm(x), which is rounded to x's type first.

    out, scales: as in quantize_rows. x, weight, eps: as in rms_norm.
    """
    _rms_norm_fp8(out, scales, x, weight, eps)


def _quantize_rows_reference(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> None:
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    scales.copy_(torch.where(largest < TINY, 1.0, largest / LARGEST))
    out.copy_(wide * (1.0 / scales).unsqueeze(1))


def _rms_norm_fp8_reference(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    normal = torch.empty_like(x)
    rms_norm(normal, x, weight, eps)
    _quantize_rows_reference(out, scales, normal)


_quantize_rows = define(
    "quantize_rows(Tensor(a!) out, Tensor(b!) scales, Tensor x) -> ()", _quantize_rows_reference
)
_rms_norm_fp8 = define(
    "rms_norm_fp8(Tensor(a!) out, Tensor(b!) scales, Tensor x, Tensor weight, float eps) -> ()",
    _rms_norm_fp8_reference,
)
