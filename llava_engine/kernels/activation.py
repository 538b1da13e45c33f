"""What stands between the two products of an MLP, in a decoder's layer and in a vision tower's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels.library import define


def silu_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """out = silu(gate) * up, SwiGLU (Shazeer 2020).

    out: [T, I]. gate_up: [T, 2 * I], the halves [gate | up], of out's dtype. silu(gate) is rounded
    to that dtype before the product.
    """
    _silu_mul(out, gate_up)


def quick_gelu(out: torch.Tensor, x: torch.Tensor) -> None:
    """out = x * sigmoid(1.702 * x), CLIP's approximation of GELU (Hendrycks and Gimpel 2016).

    out, x: dense, of one size and dtype; they may be the same tensor.
    """
    _quick_gelu(out, x)


def _silu_mul_reference(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def _quick_gelu_reference(out: torch.Tensor, x: torch.Tensor) -> None:
    torch.mul(x, torch.sigmoid(1.702 * x), out=out)


_silu_mul = define("silu_mul(Tensor(a!) out, Tensor gate_up) -> ()", _silu_mul_reference)
_quick_gelu = define("quick_gelu(Tensor(a!) out, Tensor x) -> ()", _quick_gelu_reference)
