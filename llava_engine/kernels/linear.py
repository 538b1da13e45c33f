"""Products of a few rows with a weight matrix, and what surrounds them in a decoding step.

One call is one read of the weights: the norm before a product and the rotation, activation or
residual addition behind it are part of it. For more rows torch's products are the better ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.library import define
from llava_engine.kernels.norm import rms_norm
from llava_engine.kernels.rope_kv import rope_append

_MOST_ROWS = 8  # csrc/linear.cu: kMaxTokens
_MOST_BYTES = 192 << 10  # of x, which an SM has in shared memory beside its ring
_SINCE = 9  # Hopper: GPUs before it have less shared memory than csrc/linear.cu's plan_ring takes


def most_rows(weight: torch.Tensor) -> int:
    """How many rows of x the compiled kernels take with this weight [outputs, inputs]; maybe 0."""
    outputs, inputs = weight.shape
    if weight.dtype.itemsize != 2 or inputs % 32 != 0 or outputs % 2 != 0:
        return 0
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] < _SINCE:
        return 0
    return min(_MOST_ROWS, _MOST_BYTES // (2 * inputs))


def linear_add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """residual += x @ weight.T, the product rounded to their dtype first.

    residual: [R, outputs]; x: [R, inputs]; weight: [outputs, inputs]; all dense and of one 16-bit
    dtype, as in all ops here. R is at most most_rows(weight).
    """
    _linear_add(residual, x, weight)


def norm_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
) -> None:
    """out = rms_norm(x) @ weight.T, not rounded.

    out: float32 [R, outputs]. norm_weight, eps: as in kernels.norm.
    """
    _norm_linear(out, x, norm_weight, eps, weight)


def norm_linear_silu_mul(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
) -> None:
    """out = silu_mul(rms_norm(x) @ gate_up.T).

    out: [R, wide]; gate_up: [2 * wide, inputs], the gate's rows before those of up.
    """
    _norm_linear_silu_mul(out, x, norm_weight, eps, gate_up)


def norm_qkv_rope_append(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """The query, key and value of rms_norm(x), rotated; q is written, the others go to the cache.

    q: [R, Hq, D]. k_cache, v_cache, cos_sin, positions, slot_mapping: as in rope_append.
    qkv: [(Hq + 2 * Hkv) * D, inputs], the heads of q, then of k, then of v.
    """
    _norm_qkv_rope_append(
        q, k_cache, v_cache, x, norm_weight, eps, qkv, cos_sin, positions, slot_mapping
    )


def _normed(x: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    rms_norm(out, x, norm_weight, eps)
    return out


def _linear_add_reference(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    residual.add_(F.linear(x, weight))


def _norm_linear_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
) -> None:
    out.copy_(F.linear(_normed(x, norm_weight, eps), weight))


def _norm_linear_silu_mul_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
) -> None:
    silu_mul(out, F.linear(_normed(x, norm_weight, eps), gate_up))


def _norm_qkv_rope_append_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    heads = F.linear(_normed(x, norm_weight, eps), qkv).view(len(x), -1, q.shape[2])
    q.copy_(heads[:, : q.shape[1]])
    k, v = heads[:, q.shape[1] :].chunk(2, dim=1)
    rope_append(q, k, v, cos_sin, positions, slot_mapping, k_cache, v_cache)


_linear_add = define(
    "linear_add(Tensor(a!) residual, Tensor x, Tensor weight) -> ()", _linear_add_reference
)
_norm_linear = define(
    "norm_linear(Tensor(a!) out, Tensor x, Tensor norm_weight, float eps, Tensor weight) -> ()",
    _norm_linear_reference,
)
_norm_linear_silu_mul = define(
    "norm_linear_silu_mul(Tensor(a!) out, Tensor x, Tensor norm_weight, float eps, "
    "Tensor gate_up) -> ()",
    _norm_linear_silu_mul_reference,
)
_norm_qkv_rope_append = define(
    "norm_qkv_rope_append(Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor x, "
    "Tensor norm_weight, float eps, Tensor qkv, Tensor cos_sin, Tensor positions, "
    "Tensor slot_mapping) -> ()",
    _norm_qkv_rope_append_reference,
)
