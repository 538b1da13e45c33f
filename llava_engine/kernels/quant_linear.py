"""Products of a few rows with weights of 8 or 4 bits, in a decoding step; those weights in 16 bits.

As in kernels.linear a call is one read of the weights, for each 16 rows of x; products of more are
kernels.matmul's. kernels.dequantize says what a format means. int8 and fp8 matrices are here as
they are there, NF4 ones are repacked (`pack_nf4`), so that a block of threads reads them as runs of
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llava_engine.kernels.dequantize import (
    BLOCK,
    GROUP,
    dequantize_fp8,
    dequantize_int8,
    dequantize_nf4,
)
from llava_engine.kernels.fp8 import FP8
from llava_engine.kernels.library import define
from llava_engine.kernels.linear import linear_add, norm_linear_silu_mul, norm_qkv_rope_append

UNIT_ROWS = 16
"""Outputs are a multiple of it."""
_STEP = 2 * BLOCK  # inputs that an NF4 unit's bytes come in
_HEAD_BYTES, _CODE_BYTES, _STEP_BYTES = 16 * UNIT_ROWS, 64 * UNIT_ROWS, 66 * UNIT_ROWS
_MOST_ROWS, _MOST_NF4_ROWS = 8, 16  # as in csrc/decoder.cpp
_SINCE = 9  # Hopper


@dataclass(frozen=True, slots=True, eq=False)
class QuantMatrix:
    """A matrix [outputs, inputs] as the kernels take it.

    weight: int8 or float8_e4m3fn [outputs, inputs], or pack_nf4's; its type is the format. scales:
    float32, of int8 the rows' largest absolute values [outputs], of fp8 the rows' factors
    [outputs], of nf4 what the blocks' 8-bit scales stand for [256]. apart: as for pack_nf4; no
    other format depends on it.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    outputs: int
    inputs: int
    apart: int

    @classmethod
    def stored(
        cls, weight: torch.Tensor, scales: torch.Tensor, inputs: int, apart: int
    ) -> QuantMatrix:
        """The matrix whose tensors these are."""
        return cls(weight, scales, outputs_of(weight), inputs, apart)


def outputs_of(weight: torch.Tensor) -> int:
    """Rows of QuantMatrix.weight, or of a matrix that is not quantised."""
    return len(weight) * (UNIT_ROWS if weight.dtype == torch.uint8 else 1)


def most_rows(outputs: int, inputs: int, device: torch.device, *, packed: bool) -> int:
    """For how many rows of x a step takes the compiled kernels with such a matrix; maybe 0.

    They take more, and where kernels.matmul does not take the model decoder_layers uses them for
    more. packed: whether it is NF4.
    """
    if outputs % UNIT_ROWS != 0 or inputs % BLOCK != 0 or inputs > BLOCK * GROUP:
        return 0
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < _SINCE:
        return 0
    return _MOST_NF4_ROWS if packed else _MOST_ROWS


def pack_nf4(
    codes: torch.Tensor, absmax: torch.Tensor, scales2: torch.Tensor, apart: int
) -> torch.Tensor:
    """What quant.nf4 has of a matrix as uint8 [outputs / 16, bytes]; csrc/quant_linear.h has how.

    codes: uint8 [outputs, inputs / 2]; absmax: uint8 [outputs, inputs / 64]; scales2: float32
    [outputs, 4]. apart: how far apart the two rows are that the op finishes together: 1 for
    quant_linear_add, half the rows for quant_norm_linear_silu_mul, half a head's dimensions for
    quant_norm_qkv_rope_append.
    """
    order = _unit_order(len(codes), apart, codes.device)
    units, steps = len(codes) // UNIT_ROWS, -(-absmax.shape[1] // 2)
    padding = 2 * steps - absmax.shape[1]  # blocks that no kernel reads
    codes = F.pad(codes[order], (0, padding * BLOCK // 2))
    absmax = F.pad(absmax[order], (0, padding))
    # Units, whether it is a pair's second row, pairs, steps, blocks, lanes of a row, bytes.
    codes = codes.view(units, 2, 8, steps, 2, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
    absmax = absmax.view(units, 2, 8, steps, 2).permute(0, 3, 2, 4, 1)
    body = torch.cat(
        (codes.reshape(units, steps, _CODE_BYTES), absmax.reshape(units, steps, -1)), dim=2
    )
    head = scales2[order].view(units, 2, 8, 4).transpose(1, 2).contiguous().view(units, -1)
    return torch.cat((head.view(torch.uint8), body.view(units, -1)), dim=1)


def unpack_nf4(
    packed: torch.Tensor, inputs: int, apart: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pack_nf4's arguments again."""
    units, steps = len(packed), -(-inputs // _STEP)
    head = packed[:, :_HEAD_BYTES].contiguous().view(torch.float32).view(units, 8, 2, 4)
    body = packed[:, _HEAD_BYTES:].view(units, steps, _STEP_BYTES)
    codes = body[..., :_CODE_BYTES].reshape(units, steps, 2, 8, 4, 2, 8)
    absmax = body[..., _CODE_BYTES:].reshape(units, steps, 8, 2, 2)
    rows = units * UNIT_ROWS
    order = _unit_order(rows, apart, packed.device)
    natural = (
        codes.permute(0, 5, 3, 1, 2, 4, 6).reshape(rows, -1)[:, : inputs // 2],
        absmax.permute(0, 4, 2, 1, 3).reshape(rows, -1)[:, : inputs // BLOCK],
        head.transpose(1, 2).reshape(rows, 4),
    )
    codes, absmax, scales2 = (torch.empty_like(x).index_copy_(0, order, x) for x in natural)
    return codes, absmax, scales2


def _unit_order(rows: int, apart: int, device: torch.device) -> torch.Tensor:
    """The rows of all units: eight pairs' first ones, then their second ones."""
    pairs = torch.arange(rows // 2, device=device)
    first = pairs // apart * 2 * apart + pairs % apart
    return torch.stack((first.view(-1, 8), first.view(-1, 8) + apart), dim=1).flatten()


def dequantize_rows(out: torch.Tensor, matrix: QuantMatrix, first_row: int = 0) -> None:
    """out = rows of the matrix in their natural order, to the bit as its format's class has them.

    out: [rows, inputs], float16 or bfloat16 (by the reference float32, too).
    """
    _dequantize_rows(out, matrix.weight, matrix.scales, matrix.apart, first_row)


def quant_linear_add(residual: torch.Tensor, x: torch.Tensor, matrix: QuantMatrix) -> None:
    """kernels.linear.linear_add with a quantised matrix.

    The weights are not rounded to 16 bits first, as they are in what defines it.
    """
    _quant_linear_add(residual, x, matrix.weight, matrix.scales)


def quant_norm_linear_silu_mul(
    out: torch.Tensor, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, gate_up: QuantMatrix
) -> None:
    """kernels.linear.norm_linear_silu_mul with a quantised matrix; see quant_linear_add."""
    _quant_norm_linear_silu_mul(out, x, norm_weight, eps, gate_up.weight, gate_up.scales)


def quant_norm_qkv_rope_append(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: QuantMatrix,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """kernels.linear.norm_qkv_rope_append with a quantised matrix; see quant_linear_add."""
    _quant_norm_qkv_rope_append(
        q,
        k_cache,
        v_cache,
        x,
        norm_weight,
        eps,
        qkv.weight,
        qkv.scales,
        cos_sin,
        positions,
        slot_mapping,
    )


def _whole(
    weight: torch.Tensor, scales: torch.Tensor, inputs: int, apart: int, dtype: torch.dtype
) -> torch.Tensor:
    """The matrix in `dtype`."""
    if weight.dtype == torch.int8:
        return dequantize_int8(weight, scales, dtype)
    if weight.dtype == FP8:
        return dequantize_fp8(weight, scales, dtype)
    codes, absmax, scales2 = unpack_nf4(weight, inputs, apart)
    return dequantize_nf4(codes, absmax, scales, scales2, dtype)


def _dequantize_rows_reference(
    out: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    apart: int,
    first_row: int,
) -> None:
    matrix = _whole(weight, scales, out.shape[1], apart, out.dtype)
    out.copy_(matrix[first_row : first_row + len(out)])


def _quant_linear_add_reference(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> None:
    matrix = _whole(weight, scales, x.shape[1], 1, x.dtype)
    linear_add(residual, x, matrix)


def _quant_norm_linear_silu_mul_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    matrix = _whole(gate_up, scales, x.shape[1], out.shape[1], x.dtype)
    norm_linear_silu_mul(out, x, norm_weight, eps, matrix)


def _quant_norm_qkv_rope_append_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: torch.Tensor,
    scales: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    matrix = _whole(qkv, scales, x.shape[1], q.shape[2] // 2, x.dtype)
    norm_qkv_rope_append(
        q, k_cache, v_cache, x, norm_weight, eps, matrix, cos_sin, positions, slot_mapping
    )


_dequantize_rows = define(
    "dequantize_rows(Tensor(a!) out, Tensor weight, Tensor scales, int apart, int first_row) -> ()",
    _dequantize_rows_reference,
)
_quant_linear_add = define(
    "quant_linear_add(Tensor(a!) residual, Tensor x, Tensor weight, Tensor scales) -> ()",
    _quant_linear_add_reference,
)
_quant_norm_linear_silu_mul = define(
    "quant_norm_linear_silu_mul(Tensor(a!) out, Tensor x, Tensor norm_weight, float eps, "
    "Tensor gate_up, Tensor scales) -> ()",
    _quant_norm_linear_silu_mul_reference,
)
_quant_norm_qkv_rope_append = define(
    "quant_norm_qkv_rope_append(Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor x, "
    "Tensor norm_weight, float eps, Tensor qkv, Tensor scales, Tensor cos_sin, "
    "Tensor positions, Tensor slot_mapping) -> ()",
    _quant_norm_qkv_rope_append_reference,
)
