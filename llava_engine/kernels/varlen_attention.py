"""Causal attention of several sequences' newest tokens over dense keys, by kernels of others.

The three functions here do the same: torch's flash kernel, the flash_attn package's, and plain
torch, which is the definition. Paged keys are kernels.attention's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from llava_engine.errors import KernelsNotBuilt

VarlenAttention: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float],
    torch.Tensor,
]
"""(q, k, v, cu_query, cu_context, max_query_len, max_context_len, scale) to [T, Hq, D].

q: [T, Hq, D]; k, v: [K, Hkv, D], the sequences' rows one after the other; the last dimension is
    dense. Hq is a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
cu_query, cu_context: int32 [S + 1], where each sequence's rows begin and end in q, and in k and v.
    Row i of n sees its sequence's keys 0 to context - n + i.
max_query_len, max_context_len: of the longest sequence.
scale: factor of the scores before the softmax.
"""

_MAX_HEAD_DIM = 256  # of flash attention 2, which torch has too; and multiples of 8 alone


def flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the two flash kernels are made for such heads."""
    wide = dtype not in (torch.float16, torch.bfloat16)
    return not wide and head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM


def plain_varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_query: torch.Tensor,
    cu_context: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """VarlenAttention on any device, in any type; it reads the lengths back from the device."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows: list[int] = cu_query.tolist()
    keys: list[int] = cu_context.tolist()
    for s in range(len(rows) - 1):
        mine, seen = slice(rows[s], rows[s + 1]), slice(keys[s], keys[s + 1])
        n, context = mine.stop - mine.start, seen.stop - seen.start
        mask = torch.ones(n, context, dtype=torch.bool, device=q.device).tril(context - n)
        attended = F.scaled_dot_product_attention(
            q[mine].transpose(0, 1).unsqueeze(0),
            k[seen].transpose(0, 1).unsqueeze(0),
            v[seen].transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[mine] = attended.squeeze(0).transpose(0, 1)
    return out


def torch_flash_varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_query: torch.Tensor,
    cu_context: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """VarlenAttention by the flash kernel that is part of torch. CUDA only; see flash_takes.

    By the operator itself: scaled_dot_product_attention takes no sequences of several lengths, and
    choosing its backend (sdpa_kernel) sets flags of the whole process, under other threads' feet.
    """
    attended: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_query,
        cu_context,
        max_query_len,
        max_context_len,
        0.0,  # dropout
        True,  # causal; the last row sees the last key, whatever the lengths
        False,
        scale=scale,
    )[0]
    return attended


def flash_attn_varlen_attention() -> VarlenAttention:
    """VarlenAttention of the flash_attn package. Raises KernelsNotBuilt where it is not usable."""
    try:
        package: Any = importlib.import_module("flash_attn")
    except ModuleNotFoundError as error:
        raise KernelsNotBuilt(
            'EngineConfig(attention="flash_attn") needs the flash-attn package, which is not '
            'installed; install it (pip install "llava-engine[flash]"), or choose another attention'
        ) from error
    except ImportError as error:  # built for another torch: symbols are missing
        raise KernelsNotBuilt(
            f"the installed flash-attn package cannot be loaded into torch {torch.__version__}; "
            "build it again for this torch, or choose another EngineConfig(attention=...)"
        ) from error
    varlen = package.flash_attn_varlen_func

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_query: torch.Tensor,
        cu_context: torch.Tensor,
        max_query_len: int,
        max_context_len: int,
        scale: float,
    ) -> torch.Tensor:
        attended: torch.Tensor = varlen(
            q,
            k,
            v,
            cu_query,
            cu_context,
            max_query_len,
            max_context_len,
            softmax_scale=scale,
            causal=True,
        )
        return attended

    return attention
