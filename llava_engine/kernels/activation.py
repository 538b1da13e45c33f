"""The gated activation between a decoder layer's two MLP products."""

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


def _silu_mul_reference(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


_silu_mul = define("silu_mul(Tensor(a!) out, Tensor gate_up) -> ()", _silu_mul_reference)
