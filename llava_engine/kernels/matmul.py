"""Products of many rows and what follows them in one kernel, on Hopper, for prefill, and with
quantised weights for steps, too.

They take 16-bit or float8_e4m3fn matrices with rows of whole 16 bytes and a multiple of 8 outputs,
and with x in 16 bits quantised weights, too (QuantMatrix); others they refuse (csrc/matmul.cu:
matmul_takes). Elsewhere, and for those, the decoder uses torch's products and the kernels of the
other families one by one (csrc/decoder.cpp, network.llama), with the same results but for the order
of rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels.library import define
from llava_engine.kernels.quant_linear import QuantMatrix, dequantize_rows
from llava_engine.kernels.rope_kv import rope_append

ACTIVATIONS = (None, "gelu", "quick_gelu")
"""What matmul_store knows, in the order of the kernel's numbers."""

HEAD_DIM = 128
"""Dimensions of the heads that matmul_rope_append takes."""


def matmul_store(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> None:
    """out = activation(x @ weight.T + bias).

    out: [T, outputs]. x: [T, inputs]. weight: [outputs, inputs]. bias: [outputs] or None.
    activation: one of ACTIVATIONS; "gelu" is the exact (erf) one.
    """
    _store(out, x, weight, bias, ACTIVATIONS.index(activation))


def matmul_add(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> None:
    """residual += x @ weight.T + bias.

    Shapes as for matmul_store. x_scales: float32 [T], weight_scales: float32 [outputs], by which
    sums of float8 are multiplied. With x in 16 bits weight may be QuantMatrix.weight (apart: 1) and
    weight_scales QuantMatrix.scales; NF4 takes no bias. Else None.
    """
    _add(residual, x, weight, bias, x_scales, weight_scales)


def matmul_silu_mul(
    out: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> None:
    """out = silu(x @ gate.T) * (x @ up.T).

    out: [T, wide]. gate_up: [2 * wide, inputs], the gate's rows first (apart: wide). Scales as for
    matmul_add.
    """
    _silu_mul(out, x, gate_up, x_scales, weight_scales)


def matmul_rope_append(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> None:
    """Queries, keys and values of x, rotated, the latter two put into the cache; see rope_append.

    q: [T, q_heads, HEAD_DIM]. qkv: [(q_heads + 2 * kv_heads) * HEAD_DIM, inputs] (apart: half of
    HEAD_DIM). Scales as for matmul_add.
    """
    _rope_append(
        q,
        k_cache,
        v_cache,
        x,
        qkv,
        x_scales,
        weight_scales,
        cos_sin,
        positions,
        slot_mapping,
    )


def _product(
    dtype: torch.dtype,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    apart: int,
) -> torch.Tensor:
    if weight_scales is None:
        return F.linear(x, weight, bias)
    if x_scales is None:
        if bias is not None and weight.dtype == torch.uint8:
            raise ValueError("products with NF4 weights take no bias")
        matrix = QuantMatrix.stored(weight, weight_scales, x.shape[1], apart)
        whole = x.new_empty(matrix.outputs, matrix.inputs)
        dequantize_rows(whole, matrix)
        return F.linear(x, whole, bias)
    sums = x.float() @ weight.float().T * weight_scales * x_scales.unsqueeze(1)
    return (sums if bias is None else sums + bias).to(dtype)


def _store_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
) -> None:
    y = F.linear(x, weight, bias)
    if ACTIVATIONS[activation] == "gelu":
        y = F.gelu(y)
    elif ACTIVATIONS[activation] == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    out.copy_(y)


def _add_reference(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
) -> None:
    residual += _product(residual.dtype, x, weight, bias, x_scales, weight_scales, 1)


def _silu_mul_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
) -> None:
    both = _product(out.dtype, x, gate_up, None, x_scales, weight_scales, out.shape[1])
    gate, up = both.chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def _rope_append_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    qkv: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    dim = q.shape[-1]
    heads = _product(q.dtype, x, qkv, None, x_scales, weight_scales, dim // 2).view(len(x), -1, dim)
    queries, keys_values = heads[:, : q.shape[1]], heads[:, q.shape[1] :]
    keys, values = keys_values.chunk(2, dim=1)
    rope_append(queries, keys, values, cos_sin, positions, slot_mapping, k_cache, v_cache)
    q.copy_(queries)


_store = define(
    "matmul_store(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, int activation) -> ()",
    _store_reference,
)
_add = define(
    "matmul_add(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias, Tensor? x_scales, "
    "Tensor? weight_scales) -> ()",
    _add_reference,
)
_silu_mul = define(
    "matmul_silu_mul(Tensor(a!) out, Tensor x, Tensor gate_up, Tensor? x_scales, "
    "Tensor? weight_scales) -> ()",
    _silu_mul_reference,
)
_rope_append = define(
    "matmul_rope_append(Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor x, "
    "Tensor qkv, Tensor? x_scales, Tensor? weight_scales, Tensor cos_sin, Tensor positions, "
    "Tensor slot_mapping) -> ()",
    _rope_append_reference,
)
