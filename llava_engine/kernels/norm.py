"""RMSNorm, alone and with the residual addition that precedes it."""

from __future__ import annotations

import torch

from llava_engine.kernels.library import define


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    out, x: [T, H], of one dtype; they may be the same tensor. weight: [H], of that dtype. The
    normalised row is computed in float32 and rounded to x's dtype before it meets the weight, as in
    transformers' LlamaRMSNorm (Zhang and Sennrich 2019).
    """
    _rms_norm(out, x, weight, eps)


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += x, then out = rms_norm(residual).

    out, residual, x: [T, H], of one dtype; out may be x. The sum is rounded to that dtype before it
    is normalised. weight: [H].
    """
    _add_rms_norm(out, residual, x, weight, eps)


def _rms_norm_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    torch.mul((wide * scale).to(x.dtype), weight, out=out)


def _add_rms_norm_reference(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    residual.add_(x)
    _rms_norm_reference(out, residual, weight, eps)


_rms_norm = define(
    "rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()", _rms_norm_reference
)
_add_rms_norm = define(
    "add_rms_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, float eps) -> ()",
    _add_rms_norm_reference,
)
