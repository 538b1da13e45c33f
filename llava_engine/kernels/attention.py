"""Attention of a step's new tokens over the paged KV cache: prefill chunks and decoding alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_engine.kernels.library import define

_SPLIT_TARGET = 384  # csrc/attention_decode.cu: kSplitTarget
_GROUPED = 4  # query heads that it answers from one read of a key head, where heads are grouped


def attention_workspace(
    num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> torch.Tensor:
    """Scratch memory for paged_attention on `device`, for any batch and context.

    float32, zero at first; the kernel leaves its counters zero. Calls that share one must run on
    one stream.
    """
    if device.type == "cpu":
        return torch.zeros(0)
    together = 1 if num_heads == num_kv_heads else _GROUPED
    words = _SPLIT_TARGET * (1 + together * (head_dim + 2))
    return torch.zeros(words, device=device)


def paged_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> None:
    """Causal grouped-query attention of each sequence's newest tokens over its whole context.

    out, q: [T, Hq, D], the sequences' rows one after the other; out is dense, q's first dimension
        may have any stride.
    k_cache, v_cache: [num_blocks, Hkv, block_size, D], of q's dtype and dense. Hq is a multiple of
        Hkv; query head h reads key head h // (Hq // Hkv).
    block_table: int32 [S, max_blocks], the blocks of each sequence in order; what stands behind its
        last block is not read.
    query_start: int32 [S + 1]; sequence s owns rows query_start[s] to query_start[s + 1].
    context_lens: int32 [S], keys of each sequence, its new tokens included: row i of n sees keys 0
        to context_lens - n + i. A length of 0 marks a padding row, which is written as zeros.
    workspace: of attention_workspace; the reference needs none.
    max_query_len: no sequence has more rows in q; 1 is a decoding step.
    scale: factor of the scores before the softmax.

    The new tokens' keys and values are in the cache already (rope_append).
    """
    _paged_attention(
        out,
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


def _paged_attention_reference(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    max_query_len: int,
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
            places = torch.arange(context, device=q.device).unsqueeze(0)
            k, v = _gather(k_cache, v_cache, block_table[s : s + 1], places)
            out[rows] = _prefill(q[rows], k, v, scale)
    if not decoding:
        return
    context_lens = context_lens.long()
    index = torch.tensor(decoding, device=q.device)
    rows_of = query_start.long()[index]
    block_table, context_lens = block_table[index], context_lens[index]
    places = torch.arange(max(contexts[s] for s in decoding), device=q.device)
    valid = places < context_lens.unsqueeze(1)
    # Behind a sequence's end its first key stands in: masked all the same, but surely finite, which
    # what was last in an unused slot may not be (0 * nan = nan).
    k, v = _gather(k_cache, v_cache, block_table, places * valid)
    out[rows_of] = _decode(q[rows_of], k, v, valid, scale)


def _gather(
    k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [S, Hkv, n, D] at `places` [S, n] of the sequences of `block_table`."""
    _, kv_heads, block_size, dim = k_cache.shape
    blocks = block_table.long().gather(1, places // block_size).unsqueeze(1)
    heads = torch.arange(kv_heads, device=places.device).unsqueeze(1)
    # As rows of D, which copy faster than by a pair of indices around the heads.
    rows = (blocks * kv_heads + heads) * block_size + (places % block_size).unsqueeze(1)
    return F.embedding(rows, k_cache.view(-1, dim)), F.embedding(rows, v_cache.view(-1, dim))


def _prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence's chunk: q [n, Hq, D] over k, v [1, Hkv, context, D]; returns [n, Hq, D]."""
    n, context = len(q), k.shape[2]
    mask = None
    if context > n:
        mask = torch.ones(n, context, dtype=torch.bool, device=q.device).tril(context - n)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended.squeeze(0).transpose(0, 1)


def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, scale: float
) -> torch.Tensor:
    """One new token per sequence: q [S, Hq, D] over k, v [S, Hkv, n, D] where `valid` [S, n]."""
    (count, heads, dim), kv_heads = q.shape, k.shape[1]
    # With one query per sequence nothing is causal: the heads of a group become its queries.
    attended = F.scaled_dot_product_attention(
        q.reshape(count, kv_heads, heads // kv_heads, dim),
        k,
        v,
        attn_mask=valid[:, None, None, :] if count > 1 else None,
        scale=scale,
    )
    return attended.reshape(count, heads, dim)


_paged_attention = define(
    "paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor query_start, Tensor context_lens, Tensor(b!) workspace, int max_query_len, "
    "float scale) -> ()",
    _paged_attention_reference,
)
