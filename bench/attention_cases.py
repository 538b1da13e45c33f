"""bench/kernels.py's cases of attention, and cuDNN's, which is beside some of them."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from bench.timing import BLOCK, DEVICE, DIM, HEADS, Call, Case, half
from llava_engine.kernels.attention import attention_workspace, paged_attention
from llava_engine.kernels.varlen_attention import torch_flash_varlen_attention
from llava_engine.network.attention import PrefillAttention


def attention(sequences: int, new: int, context: int, kv_heads: int = HEADS) -> Case:
    """Dense keys for torch: [sequences, kv_heads, context, DIM], causal at the end."""

    def make() -> tuple[Call, Call]:
        blocks = -(-context // BLOCK)
        k_cache, v_cache = (half(sequences * blocks, kv_heads, BLOCK, DIM) for _ in range(2))
        order = torch.randperm(sequences * blocks, device=DEVICE).int()
        q = half(sequences * new, HEADS, DIM)
        out = torch.empty_like(q)
        starts = (torch.arange(sequences + 1, device=DEVICE) * new).int()
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
        table = order.view(sequences, blocks)
        workspace = attention_workspace(HEADS, kv_heads, DIM, DEVICE)
        k, v = (half(sequences, kv_heads, context, DIM) for _ in range(2))
        dense = q.view(sequences, new, HEADS, DIM).transpose(1, 2)
        causal = new == context
        mask = None
        if 1 < new < context:
            mask = torch.ones(new, context, dtype=torch.bool, device=DEVICE).tril(context - new)
        return (
            lambda: paged_attention(
                out, q, k_cache, v_cache, table, starts, contexts, workspace, new, DIM**-0.5
            ),
            lambda: F.scaled_dot_product_attention(
                dense, k, v, attn_mask=mask, is_causal=causal, enable_gqa=kv_heads != HEADS
            ),
        )

    seen = new * context - new * (new - 1) // 2
    name = f"attention S={sequences} new={new} context={context}"
    nbytes = 4 * sequences * DIM * (kv_heads * context + HEADS * new)
    flops = 4 * sequences * seen * HEADS * DIM
    return Case(f"{name} kv_heads={kv_heads}", nbytes, make, flops)


def dense_prefill(sequences: int, new: int, context: int) -> Case:
    """Chunks as a step has them: q, k and v are slices of one matrix, earlier keys in the cache."""

    def make() -> tuple[Call, Call]:
        blocks = -(-context // BLOCK)
        k_cache, v_cache = (half(sequences * blocks, HEADS, BLOCK, DIM) for _ in range(2))
        table = torch.randperm(sequences * blocks).view(sequences, blocks).numpy()
        q, k, v = half(sequences * new, 3 * HEADS, DIM).chunk(3, dim=1)
        planner = PrefillAttention(
            torch_flash_varlen_attention,
            min_rows=2,
            num_kv_heads=HEADS,
            key_bytes=4 * HEADS * DIM,
        )
        plan = planner.plan([new] * sequences, [context] * sequences, table, BLOCK, DEVICE)
        assert plan is not None and not plan.num_paged
        if new == context:
            by_heads = [x.view(sequences, new, HEADS, DIM).transpose(1, 2) for x in (q, k, v)]
            return (
                lambda: plan(q, k, v, k_cache, v_cache, DIM**-0.5),
                lambda: cudnn(*by_heads),
            )
        keys, values = (half(sequences * context, HEADS, DIM) for _ in range(2))
        lengths = (plan.cu_query, plan.cu_context, new, context)
        return (
            lambda: plan(q, k, v, k_cache, v_cache, DIM**-0.5),
            lambda: torch_flash_varlen_attention(q, keys, values, *lengths, DIM**-0.5),
        )

    seen = new * context - new * (new - 1) // 2
    nbytes = 4 * sequences * DIM * HEADS * (context + new)
    flops = 4 * sequences * seen * HEADS * DIM
    return Case(f"dense prefill S={sequences} new={new} context={context}", nbytes, make, flops)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of whole prompts by cuDNN, [S, heads, n, D]."""
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    return op(q, k, v, None, False, 0.0, True, False)[0]


def cudnn_first_call_ms() -> float:
    """Milliseconds of the first call at a length that is new to the process, the median of five."""
    times = []
    for length in (620, 611, 612, 613, 614, 615):
        q, k, v = (half(1, HEADS, length, DIM) for _ in range(3))
        torch.cuda.synchronize()
        start = time.perf_counter()
        cudnn(q, k, v)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
