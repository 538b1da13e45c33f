"""Runs every CUDA kernel a few times at small sizes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python bench/sanitize.py
compute-sanitizer --tool racecheck python bench/sanitize.py attention sampling linear matmul step
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from llava_engine.kernels.activation import quick_gelu, silu_mul
from llava_engine.kernels.attention import attention_workspace, paged_attention
from llava_engine.kernels.decode_step import advance
from llava_engine.kernels.decoder import DecoderTensors
from llava_engine.kernels.fp8 import FP8, quantize_rows, rms_norm_fp8
from llava_engine.kernels.library import require_kernels
from llava_engine.kernels.linear import (
    linear_add,
    norm_linear,
    norm_linear_silu_mul,
    norm_qkv_rope_append,
)
from llava_engine.kernels.matmul import (
    HEAD_DIM,
    matmul_add,
    matmul_rope_append,
    matmul_silu_mul,
    matmul_store,
)
from llava_engine.kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    embed_norm,
    layer_norm,
    rms_norm,
)
from llava_engine.kernels.prefill import StepInputs, pack, prefill_step
from llava_engine.kernels.preprocess import COLUMNS, ROWS, DecodedPicture, Pass, preprocess
from llava_engine.kernels.projector import project
from llava_engine.kernels.quant_linear import (
    QuantMatrix,
    dequantize_rows,
    quant_linear_add,
    quant_norm_linear_silu_mul,
    quant_norm_qkv_rope_append,
)
from llava_engine.kernels.rope_kv import rope_append
from llava_engine.kernels.sampling import sample
from llava_engine.runtime.streams import DeviceStreams

GPU = torch.device("cuda")
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def norms() -> None:
    for dtype in TYPES:
        for hidden in (200, 33):
            x = torch.ones(3, hidden, device=GPU, dtype=dtype)
            rms_norm(torch.empty_like(x), x, x[0], 1e-5)
            add_rms_norm(torch.empty_like(x), x.clone(), x, x[0], 1e-5)
            layer_norm(torch.empty_like(x), x, x[0], x[1], 1e-5)
            add_layer_norm(torch.empty_like(x), x.clone(), x, x[0], x[1], 1e-5)
            out = x.new_empty(2, 3, hidden)
            embed_norm(out, torch.ones_like(out[:, 1:]), x[0], x, x[0], x[1], 1e-5)


def fp8_rows() -> None:
    for dtype in TYPES:
        for columns in (200, 33, 16392):
            x = torch.ones(3, columns, device=GPU, dtype=dtype)
            out, scales = torch.empty_like(x, dtype=FP8), torch.empty(3, device=GPU)
            quantize_rows(out, scales, x)
            rms_norm_fp8(out, scales, x, x[0], 1e-5)


def activations() -> None:
    for dtype in TYPES:
        for wide in (200, 33):
            gate_up = torch.ones(3, 2 * wide, device=GPU, dtype=dtype)
            silu_mul(gate_up.new_empty(3, wide), gate_up)
            quick_gelu(gate_up, gate_up)


def ropes() -> None:
    rows = torch.arange(5, device=GPU)
    for dtype in TYPES:
        for dim in (32, 12):
            q, k = (torch.ones(5, heads, dim, device=GPU, dtype=dtype) for heads in (4, 2))
            cache = q.new_zeros(3, 2, 2, dim)
            rope_append(q, k, k.clone(), torch.ones(5, dim, device=GPU), rows, rows, cache, cache)


def linears() -> None:
    for dtype in TYPES[:2]:
        for inputs, rows in ((224, 3), (4096, 1), (1056, 8)):
            x = torch.ones(rows, inputs, device=GPU, dtype=dtype)
            weight = torch.ones(96, inputs, device=GPU, dtype=dtype)
            linear_add(x.new_ones(rows, 96), x, weight)
            norm_linear(torch.empty(rows, 96, device=GPU), x, x[0], 1e-5, weight)
            norm_linear_silu_mul(x.new_empty(rows, 48), x, x[0], 1e-5, weight)
            q, cache, places = (
                x.new_empty(rows, 2, 24),
                x.new_zeros(3, 1, 4, 24),
                torch.arange(rows),
            )
            cos_sin, places = torch.ones(rows, 24, device=GPU), places.to(GPU)
            norm_qkv_rope_append(
                q, cache, cache.clone(), x, x[0], 1e-5, weight, cos_sin, places, places
            )
        # So many outputs that each block's ring goes round.
        x = torch.ones(2, 512, device=GPU, dtype=dtype)
        weight = torch.ones(8 * 132 * 14, 512, device=GPU, dtype=dtype)
        linear_add(x.new_ones(2, len(weight)), x, weight)


def quantised() -> None:
    """Rings that go round, x in spans, two tiles of tokens and several launches."""
    for dtype in TYPES[:2]:
        for kind in (torch.int8, FP8, torch.uint8):
            for inputs, rows in (
                (192, 3),
                (4096, 1),
                (11008, 1),
                (11008, 9),
                (6144, 8),
                (4096, 20),
            ):
                outputs = 16 * 132 * 2 if rows == 1 else 128  # 64 of q, as many of k and v
                x = torch.ones(rows, inputs, device=GPU, dtype=dtype)
                packed = kind == torch.uint8
                steps = 256 + -(-inputs // 128) * 1056
                shape = (outputs // 16, steps) if packed else (outputs, inputs)
                weight = torch.zeros(shape, device=GPU, dtype=kind)
                scales = torch.zeros(256 if packed else outputs, device=GPU)
                matrix = QuantMatrix(weight, scales, outputs, inputs, outputs // 2)
                quant_linear_add(x.new_ones(rows, outputs), x, matrix)
                quant_norm_linear_silu_mul(x.new_empty(rows, outputs // 2), x, x[0], 1e-5, matrix)
                q, cache = (
                    x.new_empty(rows, outputs // 32, 16),
                    x.new_zeros(5, outputs // 64, 4, 16),
                )
                cos_sin, places = torch.ones(rows, 16, device=GPU), torch.arange(rows, device=GPU)
                quant_norm_qkv_rope_append(
                    q, cache, cache.clone(), x, x[0], 1e-5, matrix, cos_sin, places, places
                )
                dequantize_rows(x.new_empty(7, inputs), matrix, 5)


def quantised_matmuls() -> None:
    """Inputs in four parts and in two, rings that go round, several tiles one after the other, a
    last slot that is half full."""
    places, cos_sin = torch.arange(602, device=GPU), torch.ones(602, HEAD_DIM, device=GPU)
    cases = ((20, 4480, 4), (50, 2240, 40), (100, 576, 4), (150, 320, 172), (602, 1088, 172))
    for dtype in TYPES[:2]:
        for kind in (torch.int8, FP8, torch.uint8):
            for rows, inputs, tiles in cases:
                outputs, packed = tiles * HEAD_DIM, kind == torch.uint8
                steps = 256 + -(-inputs // 128) * 1056
                shape = (outputs // 16, steps) if packed else (outputs, inputs)
                weight = torch.zeros(shape, device=GPU, dtype=kind)
                scales = torch.zeros(256 if packed else outputs, device=GPU)
                x = torch.ones(rows, inputs, device=GPU, dtype=dtype)
                matmul_add(x.new_ones(rows, outputs), x, weight, weight_scales=scales)
                matmul_silu_mul(x.new_empty(rows, outputs // 2), x, weight, weight_scales=scales)
                heads = tiles // 4
                q = x.new_empty(rows, 2 * heads, HEAD_DIM)
                cache = x.new_zeros(10, heads, 64, HEAD_DIM)
                where = cos_sin, places[:rows], places[:rows]
                matmul_rope_append(q, cache, cache.clone(), x, weight, *where, weight_scales=scales)


def pictures() -> None:
    """5 of 9 rows and 11 of 30 columns from all, then 4 x 6 patches of 2 x 2."""
    pixels = np.full((9, 30, 3), 200, np.uint8)
    rows = np.array([[0, 1, 3, 5, 6], *[[1 << 21] * 5] * 3, *[[1 << 20] * 5] * 3], np.int32)
    columns = [[*range(0, 22, 2)], *[[1 << 21] * 11] * 3, *[[1 << 19] * 11] * 9]
    passes = Pass(ROWS, rows), Pass(COLUMNS, np.array(columns, np.int32))
    levels, streams = np.ones((256, 3), np.float32), DeviceStreams(GPU)
    for order in (passes, passes[::-1]):
        picture = DecodedPicture(pixels, order, (9, 13), (3, 1), levels, pixels.nbytes)
        uploaded, places = streams.upload(picture.arrays)
        for dtype in TYPES:
            out = torch.empty(24, 16, dtype=dtype, device=GPU)
            preprocess(out, picture, uploaded, places, 2)


def matmuls() -> None:
    heads, places = 2, torch.arange(330, device=GPU)
    cos_sin = torch.ones(330, HEAD_DIM, device=GPU)
    for dtype in TYPES[:2]:
        for rows, inputs in ((130, 72), (150, 576), (330, 200)):  # tiles of three widths
            x = torch.ones(rows, inputs, device=GPU, dtype=dtype)
            weight = torch.ones(4 * HEAD_DIM, inputs, device=GPU, dtype=dtype)
            values, scales = x.to(FP8), torch.ones(rows, device=GPU)
            weight_scales = torch.ones(len(weight), device=GPU)
            matmul_store(x.new_empty(rows, 512), x, weight, weight[:, 0].contiguous(), "gelu")
            q, cache = x.new_empty(rows, heads, HEAD_DIM), x.new_zeros(6, 1, 64, HEAD_DIM)
            args = cos_sin, places[:rows], places[:rows]
            matmul_rope_append(q, cache, cache.clone(), x, weight, *args)
            for given, w, of in (
                (x, weight, (None, None)),
                (values, weight.to(FP8), (scales, weight_scales)),
            ):
                if given.shape[1] % 16 == 0 or given is x:
                    matmul_add(x.new_ones(rows, 512), given, w, None, *of)
                    matmul_silu_mul(x.new_empty(rows, 256), given, w, *of)


def projectors() -> None:
    for dtype in TYPES:
        x = torch.ones(3, 8, 24, device=GPU, dtype=dtype)[:, 1:]
        weight = torch.ones(24, 24, device=GPU, dtype=dtype)
        project(x.new_empty(x.shape), x, weight, weight[0], weight, None)
        project(x.new_empty(1, 7, 24), x[:1], weight, weight[0], weight, None)


def attentions() -> None:
    lengths = [(1, 77), (1, 0), (70, 140), (2, 5), (1, 300), (0, 0)]
    contexts = torch.tensor([context for _, context in lengths], device=GPU).int()
    rows = torch.tensor([0] + [new for new, _ in lengths], device=GPU).cumsum(0).int()
    table = torch.arange(6 * 19, device=GPU).int().view(6, 19)
    for dtype in TYPES:
        for heads, kv_heads, dim in ((4, 4, 128), (4, 2, 64), (3, 1, 32), (2, 2, 256), (2, 1, 12)):
            q = torch.ones(int(rows[-1]), heads, dim, device=GPU, dtype=dtype)
            workspace = attention_workspace(heads, kv_heads, dim, GPU)
            out = torch.empty_like(q)
            for block_size in (16, 64):
                cache = q.new_ones(6 * 19, kv_heads, block_size, dim)
                paged_attention(out, q, cache, cache, table, rows, contexts, workspace, 70, 0.1)


def samplings() -> None:
    logits = torch.randn(8, 3001, device=GPU)
    logits[4:] = logits[4:].round()
    ones = torch.ones(8, device=GPU)
    rows = torch.arange(8, device=GPU)
    sample(
        torch.empty(8, dtype=torch.int64, device=GPU),
        logits,
        torch.tensor([0.0, 1, 1, 1, 1, 0.5, 1, 1], device=GPU),
        torch.tensor([0, 0, 5, 0, 9, 0, 7, 0], device=GPU).int(),
        torch.tensor([1, 1, 1, 0.9, 1, 0.3, 0.8, 0.6], device=GPU),
        ones * 1.2,
        logits > 1,
        rows,
        rows,
    )


def steps() -> None:
    rows = torch.arange(5, device=GPU)
    ring = torch.zeros(4, 6, 4, dtype=torch.int32).pin_memory()
    advance(
        rows.clone(),
        rows.clone(),
        rows.clone(),
        (rows.clamp(max=3) % 3).int(),
        rows.clone(),
        (rows % 2 + 1).int(),
        torch.zeros(5, 77, dtype=torch.bool, device=GPU),
        torch.tensor([6], device=GPU),
        ring,
        rows + 2,
        torch.full((5, 2), 3, device=GPU),
        torch.ones(5, 4, device=GPU).int(),
        16,
    )


def prefills() -> None:
    """Three sequences through one layer; all sample, and two of them with a penalty."""
    hidden, heads, kv_heads, dim, vocab = 64, 2, 1, 32, 301
    tokens = np.arange(9)
    starts, ones = np.array([0, 3, 8, 9], np.int32), np.ones(3, np.float32)
    inputs = StepInputs(
        token_ids=tokens,
        positions=np.array([0, 1, 2, 0, 1, 2, 3, 4, 0]),
        slot_mapping=tokens + np.array([0, 0, 0, 13, 13, 13, 13, 13, 24]),
        wanted=starts[1:].astype(np.int64) - 1,
        seed=tokens[:3],
        position=tokens[:3],
        seen_at=np.array([0, 5, 2 * vocab, 3 * vocab - 1]),
        block_table=np.arange(3, dtype=np.int32)[:, None],
        query_start=starts,
        context_lens=np.diff(starts),
        top_k=np.array([0, 4, 0], np.int32),
        temperature=np.array([0, 1, 1], np.float32),
        top_p=ones,
        repetition_penalty=ones * 1.5,
    )
    uploaded, sizes = pack(inputs)
    for dtype in TYPES:

        def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device=GPU).to(dtype)

        qkv = some((heads + 2 * kv_heads) * dim, hidden)
        weights = [some(hidden), qkv, some(hidden, heads * dim)]
        weights += [some(hidden), some(2 * 96, hidden), some(hidden, 96)]
        decoder = DecoderTensors(
            weights,
            [],
            [],
            some(hidden),
            torch.randn(16, dim, device=GPU),
            attention_workspace(heads, kv_heads, dim, GPU),
            0.1,
            1e-5,
        )
        prefill_step(
            torch.empty(3, dtype=torch.int64, device=GPU),
            torch.from_numpy(uploaded.copy()).to(GPU),
            sizes,
            some(vocab, hidden),
            [some(4, hidden)],
            [4, 1, 3],
            [some(3, kv_heads, 16, dim)],
            [some(3, kv_heads, 16, dim)],
            decoder,
            some(vocab, hidden),
            5,
        )


GROUPS = {
    "norm": norms,
    "fp8": fp8_rows,
    "activation": activations,
    "rope": ropes,
    "linear": linears,
    "quant": quantised,
    "matmul": matmuls,
    "quant_matmul": quantised_matmuls,
    "picture": pictures,
    "projector": projectors,
    "attention": attentions,
    "sampling": samplings,
    "step": steps,
    "prefill": prefills,
}


def main() -> None:
    """Run the groups that are named, or all."""
    require_kernels(GPU)
    for name in sys.argv[1:] or GROUPS:
        GROUPS[name]()
    torch.cuda.synchronize()
    print("ran", *(sys.argv[1:] or GROUPS))


if __name__ == "__main__":
    main()
