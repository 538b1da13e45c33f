"""Attention of a step's new tokens over the paged KV cache: prefill chunks and decoding alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels._library import define


def paged_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> None:
    """Causal grouped-query attention of each sequence's newest tokens over its whole context.

    out, q: [T, Hq, D], the sequences' rows one after the other; out is dense, q's first dimension
        may have any stride.
    k_cache, v_cache: [num_blocks, Hkv, block_size, D], of q's dtype; Hq is a multiple of Hkv, and
        query head h reads key head h // (Hq // Hkv).
    block_table: int32 [S, max_blocks], the blocks of each sequence in order; what stands behind its
        last block is not read.
    query_start: int32 [S + 1]; sequence s owns rows query_start[s] to query_start[s + 1].
    context_lens: int32 [S], keys of each sequence, its new tokens included: row i of n sees keys 0
        to context_lens - n + i. A length of 0 marks a padding row, which is written as zeros.
    scale: factor of the scores before the softmax.

    The new tokens' keys and values are in the cache already (rope_append).
    """
    _paged_attention(out, q, k_cache, v_cache, block_table, query_start, context_lens, scale)


def _paged_attention_reference(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> None:
    starts: list[int] = query_start.tolist()
    contexts: list[int] = context_lens.tolist()
    decoding: list[int] = []
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        length = rows.stop - rows.start
        if context == 0:
            out[rows] = 0
        elif length == 1:
            decoding.append(s)
        elif length > 1:
            out[rows] = _prefill(q[rows], k_cache, v_cache, block_table[s], context, scale)
    if len(decoding) == len(contexts) == q.shape[0]:
        out.copy_(_decode(q, k_cache, v_cache, block_table, context_lens, max(contexts), scale))
    elif decoding:
        index = torch.tensor(decoding, device=q.device)
        row = query_start[:-1].long()[index]
        longest = max(contexts[s] for s in decoding)
        out[row] = _decode(
            q[row], k_cache, v_cache, block_table[index], context_lens[index], longest, scale
        )


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    context: int,
    scale: float,
) -> torch.Tensor:
    """One sequence's chunk: q [n, Hq, D] over `context` keys; returns [n, Hq, D]."""
    n, (_, kv_heads, block_size, dim) = q.shape[0], k_cache.shape
    blocks = blocks[: -(-context // block_size)]

    def gather(cache: torch.Tensor) -> torch.Tensor:
        rows = cache[blocks].transpose(0, 1).reshape(1, kv_heads, -1, dim)
        return rows[:, :, :context]

    mask = None
    if context > n:
        mask = torch.ones(n, context, dtype=torch.bool, device=q.device).tril(context - n)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        gather(k_cache),
        gather(v_cache),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != kv_heads,
    )
    return attended.squeeze(0).transpose(0, 1)


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """One new token per sequence: q [S, Hq, D]; returns [S, Hq, D]."""
    (count, heads, dim), (_, kv_heads, block_size, _) = q.shape, k_cache.shape
    places = torch.arange(longest, device=q.device)
    valid = places < context_lens.unsqueeze(1)
    # Behind a sequence's end its first key stands in: masked all the same, but surely finite, which
    # what was last in an unused slot may not be (0 * nan = nan).
    places = places * valid
    blocks, offsets = block_table.gather(1, places // block_size), places % block_size
    # With one query per head group there is nothing causal left: the group's heads are the queries.
    attended = F.scaled_dot_product_attention(
        q.reshape(count, kv_heads, heads // kv_heads, dim),
        k_cache[blocks, :, offsets].transpose(1, 2),
        v_cache[blocks, :, offsets].transpose(1, 2),
        attn_mask=valid[:, None, None, :],
        scale=scale,
    )
    return attended.reshape(count, heads, dim)


_paged_attention = define(
    "paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor query_start, Tensor context_lens, float scale) -> ()",
    _paged_attention_reference,
)
