"""How the rows of a step attend: through the block table, or, in long chunks, over dense keys.

Our paged kernel serves everything, unless EngineConfig(attention=...) asks for another for chunks;
their earlier keys must then be gathered from the cache. What goes where is settled on the host when
a batch is built, so that no layer asks the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from llava_engine.errors import UnsupportedModel
from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.varlen_attention import (
    VarlenAttention,
    flash_attn_varlen_attention,
    flash_takes,
    plain_varlen_attention,
    torch_flash_varlen_attention,
)
from llava_engine.network.config import TextConfig

if TYPE_CHECKING:
    from llava_engine.network.llama import Batch

_MAX_GATHERED = 128 << 20  # bytes of keys and values that a step may gather, per layer


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePrefill:
    """The last sequences of a step, whose rows attend over dense keys; the first ones stay paged.

    num_paged: sequences that stay, first_row: rows they have, max_paged_query_len: the most of one.
    cu_query, cu_context, max_query_len, max_context_len: of the dense ones, see VarlenAttention.
    cache_rows: int64 [keys, Hkv], their keys' places in a cache of rows of D; None where each is a
        whole prompt, whose keys are the step's own.
    """

    kernel: VarlenAttention
    num_paged: int
    first_row: int
    max_paged_query_len: int
    cu_query: torch.Tensor
    cu_context: torch.Tensor
    max_query_len: int
    max_context_len: int
    cache_rows: torch.Tensor | None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The dense rows' attention; arguments as for `attention`, all rows of the step."""
        if self.cache_rows is None:
            k, v = k[self.first_row :], v[self.first_row :]
        else:
            dim = k_cache.shape[-1]
            k = F.embedding(self.cache_rows, k_cache.view(-1, dim))
            v = F.embedding(self.cache_rows, v_cache.view(-1, dim))
        return self.kernel(
            q[self.first_row :],
            k,
            v,
            self.cu_query,
            self.cu_context,
            self.max_query_len,
            self.max_context_len,
            scale,
        )


class PrefillAttention:
    """Which sequences of a step attend densely, and by which kernel.

    min_rows: fewer new rows than that stay paged; at least 2, since decoding rows always do.
    key_bytes: of one token's key and value in one layer. max_gathered: bytes of them that a step
        may gather, per layer; with 0 only whole prompts attend densely.
    """

    def __init__(
        self,
        kernel: VarlenAttention,
        *,
        min_rows: int,
        num_kv_heads: int,
        key_bytes: int,
        max_gathered: int = _MAX_GATHERED,
    ) -> None:
        self._kernel = kernel
        self._min_rows = max(2, min_rows)
        self._num_kv_heads = num_kv_heads
        self._max_keys = max_gathered // key_bytes

    def plan(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_table: np.ndarray,
        block_size: int,
        device: torch.device,
    ) -> DensePrefill | None:
        """The dense part of a step, or None if all of it is paged.

        query_lens, context_lens: of each sequence, as Batch has them on the device. block_table:
        integers [S, max_blocks]. Dense are the last sequences, as many as qualify without a gap:
        a step has its decoding rows first.
        """
        first = len(query_lens)
        while (
            first
            and query_lens[first - 1] >= self._min_rows
            and self._fits(query_lens[first - 1 :], context_lens[first - 1 :])
        ):
            first -= 1
        queries, contexts, paged = query_lens[first:], context_lens[first:], query_lens[:first]
        if not queries:
            return None
        return DensePrefill(
            kernel=self._kernel,
            num_paged=first,
            first_row=sum(paged),
            max_paged_query_len=max(paged, default=0),
            cu_query=_cumulative(queries, device),
            cu_context=_cumulative(contexts, device),
            max_query_len=max(queries),
            max_context_len=max(contexts),
            cache_rows=None
            if _whole(queries, contexts)
            else self._cache_rows(contexts, block_table[first:], block_size, device),
        )

    def _fits(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> bool:
        return _whole(query_lens, context_lens) or sum(context_lens) <= self._max_keys

    def _cache_rows(
        self,
        context_lens: Sequence[int],
        block_table: np.ndarray,
        block_size: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Where the rows of D of every key stand in a cache [blocks, Hkv, block_size, D]."""
        heads = self._num_kv_heads
        places = [np.arange(context) for context in context_lens]
        starts = np.concatenate(
            [
                blocks[place // block_size].astype(np.int64) * (heads * block_size)
                + place % block_size
                for blocks, place in zip(block_table, places, strict=True)
            ]
        )
        return torch.from_numpy(starts).to(device).unsqueeze(1) + block_size * torch.arange(
            heads, device=device
        )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    workspace: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of a step's rows over their contexts, [T, Hq, D]; see paged_attention.

    q: [T, Hq, D]; k, v: [T, Hkv, D], the step's own, which are in the caches already.
    """
    dense = batch.dense
    if dense is not None and not dense.num_paged:
        return dense(q, k, v, k_cache, v_cache, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dense is None:
        paged_attention(
            out,
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.query_start,
            batch.context_lens,
            workspace,
            batch.max_query_len,
            scale,
        )
        return out
    rows, sequences = dense.first_row, dense.num_paged
    paged_attention(
        out[:rows],
        q[:rows],
        k_cache,
        v_cache,
        batch.block_table[:sequences],
        batch.query_start[: sequences + 1],
        batch.context_lens[:sequences],
        workspace,
        dense.max_paged_query_len,
        scale,
    )
    out[rows:] = dense(q, k, v, k_cache, v_cache, scale)
    return out


def require_attention(name: str, device: torch.device) -> None:
    """Raise KernelsNotBuilt or UnsupportedModel unless EngineConfig(attention=name) can be had."""
    if name != "flash_attn":
        return
    if device.type != "cuda":
        raise UnsupportedModel(
            f'EngineConfig(attention="flash_attn") runs on CUDA alone, and the model is on {device}'
        )
    flash_attn_varlen_attention()


def prefill_attention(
    name: str, config: TextConfig, dtype: torch.dtype, device: torch.device
) -> PrefillAttention | None:
    """What EngineConfig(attention=name) means for a model there; None is the paged kernel for all.

    Where the flash kernels take neither the type nor the heads (see flash_takes), all is paged.
    Raises as require_attention.
    """
    require_attention(name, device)
    on_cuda = device.type == "cuda"
    if name in ("auto", "paged"):  # the engine's own is the fastest (bench/NOTES.md)
        return None
    if on_cuda and not flash_takes(dtype, config.head_dim):
        return None
    kernel: VarlenAttention = plain_varlen_attention
    if name == "flash_attn":
        kernel = flash_attn_varlen_attention()
    elif on_cuda:
        kernel = torch_flash_varlen_attention
    return PrefillAttention(
        kernel,
        min_rows=2,
        num_kv_heads=config.num_kv_heads,
        key_bytes=2 * config.num_kv_heads * config.head_dim * dtype.itemsize,
    )


def _whole(query_lens: Sequence[int], context_lens: Sequence[int]) -> bool:
    """Whether every sequence's chunk is all there is of it."""
    return all(n == context for n, context in zip(query_lens, context_lens, strict=True))


def _cumulative(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device)
