"""All layers of the decoder over a step's rows, in one call: see csrc/decoder.cpp for why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.fp8 import FP8, quantize_rows
from llava_engine.kernels.library import define
from llava_engine.kernels.matmul import matmul_add, matmul_rope_append, matmul_silu_mul
from llava_engine.kernels.norm import rms_norm
from llava_engine.kernels.quant_linear import QuantMatrix, dequantize_rows, outputs_of

PARTS = 6
"""Tensors of a layer among DecoderTensors.weights: the norm before attention, QKV, output, the norm
behind it, gate and up, down."""

_FP8_ROWS = 128  # as in csrc/decoder.cpp: fewer are multiplied in the model's own type


class DecoderTensors(NamedTuple):
    """What the layers of a model are to decoder_layers, whose matrices have no biases and whose
    activation is SiLU.

    weights: PARTS tensors of each layer. A quantised matrix is QuantMatrix.weight; scales: of each
    layer's four matrices QuantMatrix.scales, anything for one that is not quantised, or nothing if
    none is. fp8: of each layer's four matrices the values and scales of quant.fp8, which serve from
    128 rows on, or nothing. cos_sin: as in rope_append. workspace, scale: as in paged_attention.
    """

    weights: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor]
    fp8: Sequence[torch.Tensor]
    final_norm: torch.Tensor
    cos_sin: torch.Tensor
    workspace: torch.Tensor
    scale: float
    eps: float


def decoder_layers(
    out: torch.Tensor,
    residual: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    decoder: DecoderTensors,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    wanted: torch.Tensor | None,
    max_query_len: int,
) -> None:
    """Rows through every layer and the final norm; their keys and values are put into the caches.

    residual: [T, hidden], the rows, which are changed. out: [R, hidden], those that are `wanted`,
    int64 [R], after the final norm; or all, with None. Of the others the last layer only makes keys
    and values.
    k_caches, v_caches: a layer's each. The rest is as in rope_append (positions, slot_mapping) and
    paged_attention (block_table to context_lens, max_query_len).
    """
    _decoder_layers(
        out,
        residual,
        k_caches,
        v_caches,
        decoder.weights,
        decoder.scales,
        decoder.fp8,
        decoder.final_norm,
        decoder.cos_sin,
        positions,
        slot_mapping,
        block_table,
        query_start,
        context_lens,
        wanted,
        decoder.workspace,
        max_query_len,
        decoder.scale,
        decoder.eps,
    )


def _decoder_layers_reference(
    out: torch.Tensor,
    residual: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    fp8: Sequence[torch.Tensor],
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    wanted: torch.Tensor | None,
    workspace: torch.Tensor,
    max_query_len: int,
    scale: float,
    eps: float,
) -> None:
    rows, dim = len(residual), cos_sin.shape[1]
    in_fp8 = len(fp8) > 0 and rows >= _FP8_ROWS
    x = torch.empty_like(residual)

    def product(
        layer: int, index: int, matrix: torch.Tensor, rows_of: torch.Tensor, apart: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Input and weight of a product, and the scales of both."""
        place = 4 * layer + index
        if not in_fp8:
            if matrix.dtype.itemsize == 1:
                of = QuantMatrix.stored(matrix, scales[place], rows_of.shape[1], apart)
                matrix = rows_of.new_empty(of.outputs, of.inputs)
                dequantize_rows(matrix, of)
            return rows_of, matrix, None, None
        values = torch.empty_like(rows_of, dtype=FP8)
        row_scales = torch.empty(rows, dtype=torch.float32, device=rows_of.device)
        quantize_rows(values, row_scales, rows_of)
        return values, fp8[2 * place], row_scales, fp8[2 * place + 1]

    for layer, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        input_norm, qkv, output, post_norm, gate_up, down = weights[
            PARTS * layer : PARTS * (layer + 1)
        ]
        rms_norm(x, residual, input_norm, eps)
        values, weight, x_scales, weight_scales = product(layer, 0, qkv, x, dim // 2)
        q = x.new_empty(rows, len(weight) // dim - 2 * k_cache.shape[1], dim)
        matmul_rope_append(
            q,
            k_cache,
            v_cache,
            values,
            weight,
            cos_sin,
            positions,
            slot_mapping,
            x_scales=x_scales,
            weight_scales=weight_scales,
        )
        attended = torch.empty_like(q)
        paged_attention(
            attended,
            q,
            k_cache,
            v_cache,
            block_table,
            query_start,
            context_lens,
            workspace,
            max_query_len,
            scale,
        )
        values, weight, *of_both = product(layer, 1, output, attended.view(rows, -1), 1)
        matmul_add(residual, values, weight, None, *of_both)
        rms_norm(x, residual, post_norm, eps)
        wide = outputs_of(gate_up) // 2
        values, weight, *of_both = product(layer, 2, gate_up, x, wide)
        activated = x.new_empty(rows, wide)
        matmul_silu_mul(activated, values, weight, *of_both)
        values, weight, *of_both = product(layer, 3, down, activated, 1)
        matmul_add(residual, values, weight, None, *of_both)
    rms_norm(out, residual if wanted is None else residual[wanted], final_norm, eps)


_decoder_layers = define(
    "decoder_layers(Tensor(a!) out, Tensor(b!) residual, Tensor(c!)[] k_caches, "
    "Tensor(d!)[] v_caches, Tensor[] weights, Tensor[] scales, Tensor[] fp8, Tensor final_norm, "
    "Tensor cos_sin, Tensor positions, Tensor slot_mapping, Tensor block_table, "
    "Tensor query_start, Tensor context_lens, Tensor? wanted, Tensor workspace, "
    "int max_query_len, float scale, float eps) -> ()",
    _decoder_layers_reference,
)
