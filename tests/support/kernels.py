"""What tests of single ops share, on whichever device the op runs."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from llava_engine.kernels.attention import attention_workspace, paged_attention
from llava_engine.network.attention import PrefillAttention, attention
from llava_engine.network.llama import Batch


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """An `out` in which whatever is not written shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def blank(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """The same on the GPU."""
    return poisoned(*shape, dtype=dtype, device="cuda")


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers where the generator is, drawn in float32."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def within_twice(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float = 1e-12
) -> None:
    """design.md's tolerance: at most twice the error of plain torch at the same precision."""
    error = (ours.double() - truth).pow(2).mean().sqrt()
    assert error <= 2 * (plain.double() - truth).pow(2).mean().sqrt() + floor


class PagedContext:
    """Sequences of given (new, context) lengths in a shuffled cache full of NaN elsewhere."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        generator: torch.Generator,
        block_size: int = 4,
        device: str = "cpu",
    ) -> None:
        q_heads, kv_heads, dim = heads
        counts = [-(-context // block_size) for _, context in lengths]
        order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
        poison = order.pop()
        self.k_cache = poisoned(sum(counts) + 1, kv_heads, block_size, dim, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        self.block_table = torch.full((len(lengths), max(counts) + 1), poison, dtype=torch.int32)
        self.lengths = lengths
        self.scale = 0.3
        self.keys, self.values, self.queries = [], [], []
        for row, ((new, context), count) in enumerate(zip(lengths, counts, strict=True)):
            blocks = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
            self.block_table[row, :count] = blocks
            places = torch.arange(context)
            k, v = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
            self.k_cache[blocks[places // block_size], :, places % block_size] = k
            self.v_cache[blocks[places // block_size], :, places % block_size] = v
            self.keys.append(k)
            self.values.append(v)
            self.queries.append(torch.randn(new, q_heads, dim, generator=generator).to(dtype) * 2)
        self.q = torch.cat(self.queries)
        self.device = device
        self.workspace = attention_workspace(q_heads, kv_heads, dim, torch.device(device))

    def arguments(self, rows: list[int] | None = None) -> tuple[Any, ...]:
        """The op's, over all sequences or over some; the first is a poisoned `out`."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        q = torch.cat([self.queries[row] for row in rows])
        starts = [0, *itertools.accumulate(self.lengths[row][0] for row in rows)]
        contexts = [self.lengths[row][1] for row in rows]
        tensors = (
            poisoned(*q.shape, dtype=q.dtype),
            q,
            self.k_cache,
            self.v_cache,
            self.block_table[rows],
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
        )
        longest = max(self.lengths[row][0] for row in rows)
        placed = (tensor.to(self.device) for tensor in tensors)
        return *placed, self.workspace, longest, self.scale

    def run(self, rows: list[int] | None = None) -> torch.Tensor:
        """The op's result, on the CPU."""
        arguments = self.arguments(rows)
        paged_attention(*arguments)
        return arguments[0].cpu()

    def run_step(self, prefill: PrefillAttention, *, dense: int) -> torch.Tensor:
        """What a layer's `attention` makes of all sequences as one step, on the CPU.

        dense: how many of them `prefill` must choose to take. Where these are whole prompts they
        are to be read from the step's own rows, which are NaN otherwise, and the cache is.
        """
        _, q, k_cache, v_cache, table, starts, contexts, workspace, longest, scale = (
            self.arguments()
        )
        new, lens = zip(*self.lengths, strict=True)
        plan = prefill.plan(
            new, lens, self.block_table.numpy(), self.k_cache.shape[2], torch.device(self.device)
        )
        assert (len(new) - plan.num_paged if plan is not None else 0) == dense
        own = [
            torch.cat([x[len(x) - n :] for n, x in zip(new, rows, strict=True)]).to(self.device)
            for rows in (self.keys, self.values)
        ]
        if plan is not None and plan.cache_rows is None:
            paged = self.block_table[: plan.num_paged].long().unique()
            for cache in (k_cache, v_cache):
                kept = cache[paged]
                cache.fill_(torch.nan)
                cache[paged] = kept
        else:
            for rows in own:
                rows.fill_(torch.nan)
        nowhere = torch.empty(0, dtype=torch.int64)
        batch = Batch(
            positions=nowhere,
            slot_mapping=nowhere,
            block_table=table,
            query_start=starts,
            context_lens=contexts,
            max_query_len=longest,
            dense=plan,
        )
        return attention(q, *own, k_cache, v_cache, batch, workspace, scale).cpu()

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """Attention written out in `dtype` where the op runs; padding rows are zero. On the CPU."""
        rows = []
        for (new, context), q, k, v in zip(
            self.lengths, self.queries, self.keys, self.values, strict=True
        ):
            q, k, v = (x.to(self.device, dtype) for x in (q, k, v))
            if context == 0:
                rows.append(torch.zeros_like(q))
                continue
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            future = torch.ones(new, context, device=self.device).triu(context - new + 1).bool()
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(rows).cpu()
