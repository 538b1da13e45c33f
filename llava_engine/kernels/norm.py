"""RMSNorm and LayerNorm, alone and with the addition that precedes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def layer_norm(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension.

    out, x: [T, H], of one dtype; they may be the same tensor. weight, bias: [H], of that dtype (Ba
    et al. 2016).
    """
    _layer_norm(out, x, weight, bias, eps)


def add_layer_norm(
    out: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> None:
    """residual += x, then out = layer_norm(residual).

    out, residual, x: [T, H], of one dtype; out may be x. The sum is rounded to that dtype before it
    is normalised. weight, bias: [H].
    """
    _add_layer_norm(out, residual, x, weight, bias, eps)


def embed_norm(
    out: torch.Tensor,
    patches: torch.Tensor,
    class_token: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> None:
    """A vision tower's first hidden states: layer_norm of each picture's class token and patches,
    plus their positions.

    out: [n, 1 + patches, H]. patches: [n, patches, H]. class_token: [H]. positions:
    [1 + patches, H]. weight, bias: [H]. All dense and of one dtype, which the sum is rounded to
    before it is normalised.
    """
    _embed_norm(out, patches, class_token, positions, weight, bias, eps)


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


def _layer_norm_reference(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    out.copy_(F.layer_norm(x, weight.shape, weight, bias, eps))


def _add_layer_norm_reference(
    out: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> None:
    residual.add_(x)
    _layer_norm_reference(out, residual, weight, bias, eps)


def _embed_norm_reference(
    out: torch.Tensor,
    patches: torch.Tensor,
    class_token: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> None:
    tokens = torch.cat((class_token.expand(len(patches), 1, -1), patches), dim=1)
    _layer_norm_reference(out, tokens + positions, weight, bias, eps)


_rms_norm = define(
    "rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()", _rms_norm_reference
)
_add_rms_norm = define(
    "add_rms_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, float eps) -> ()",
    _add_rms_norm_reference,
)
_layer_norm = define(
    "layer_norm(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias, float eps) -> ()",
    _layer_norm_reference,
)
_add_layer_norm = define(
    "add_layer_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, Tensor bias, "
    "float eps) -> ()",
    _add_layer_norm_reference,
)
_embed_norm = define(
    "embed_norm(Tensor(a!) out, Tensor patches, Tensor class_token, Tensor positions, "
    "Tensor weight, Tensor bias, float eps) -> ()",
    _embed_norm_reference,
)
