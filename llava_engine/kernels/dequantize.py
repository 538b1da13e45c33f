"""What weights of 8 and 4 bits stand for, in plain torch: the definition of quant/'s formats.

To the bit what bitsandbytes makes of nf4 and int8; each step is rounded to float32 as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 64
"""Weights that share a scale."""
GROUP = 256
"""Scales that share a scale."""

CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels (Dettmers et al. 2023, appendix E)."""

_RECIPROCAL = 7.874015718698502e-3  # of 127, as bitsandbytes has it


def dequantize_int8(values: torch.Tensor, scb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows values[i] * scb[i] / 127. values: int8 [rows, n]; scb: float32 [rows]."""
    return (values * scb.unsqueeze(1) * _RECIPROCAL).to(dtype)


def dequantize_fp8(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows values[i] * scales[i]. values: float8_e4m3fn [rows, n]; scales: float32 [rows]."""
    return (values.float() * scales.unsqueeze(1)).to(dtype)


def dequantize_nf4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor,
    scales2: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows [rows, n] of level * (code2[absmax] * group + offset); see quant.nf4.Nf4Weight."""
    first, following, offset, phase = scales2.unsqueeze(2).unbind(1)
    place = phase + torch.arange(absmax.shape[1], device=phase.device)
    scales = code2[absmax.int()] * torch.where(place < GROUP, first, following) + offset
    levels = nf4_levels(codes).view(*absmax.shape, BLOCK)
    return (levels * scales.unsqueeze(2)).view(len(codes), -1).to(dtype)


def nf4_levels(codes: torch.Tensor) -> torch.Tensor:
    """Both levels of every byte of uint8 [...], float32 [..., 2]."""
    codebook = torch.tensor(CODEBOOK, device=codes.device)
    return F.embedding(codes.int(), torch.cartesian_prod(codebook, codebook))
