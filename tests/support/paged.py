"""A small loop that drives a LlavaModel without the runtime: greedy decoding over a paged cache.

The cache starts as NaN, its blocks are dealt out of order, and table entries behind a sequence's
last block lead to a block that stays NaN: whoever reads what was not written, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llava_engine.network.clip import patch_rows
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel


@dataclass
class Prompt:
    """token_ids with image_token_id at every picture row; pixels [pictures, 3, side, side].

    chunk: how many of its tokens one step may prefill; None is all of them.
    """

    token_ids: list[int]
    pixels: torch.Tensor | None = None
    chunk: int | None = None


@dataclass
class Decoded:
    """The new token ids, and the logits [new tokens, vocab_size] that chose them."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@torch.inference_mode()
def greedy(
    model: LlavaModel,
    prompts: list[Prompt],
    new_tokens: int,
    *,
    block_size: int = 5,
    forced: list[list[int]] | None = None,
) -> list[Decoded]:
    """Decode all prompts in one continuous batch.

    forced: tokens to go on with in place of the chosen ones.
    """
    text, device = model.config.text, model.device
    lengths = [len(prompt.token_ids) + new_tokens for prompt in prompts]
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(needed) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    poison = order.pop()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    width = max(needed) + 2
    tables = [table + [poison] * (width - len(table)) for table in tables]
    shape = (sum(needed) + 1, text.num_kv_heads, block_size, text.head_dim)
    k_caches = [
        torch.full(shape, torch.nan, dtype=model.dtype, device=device)
        for _ in range(text.num_layers)
    ]
    v_caches = [cache.clone() for cache in k_caches]

    rows = [_embed(model, prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    decoded = [Decoded() for _ in prompts]
    while any(len(answer.token_ids) < new_tokens for answer in decoded):
        active, chunks, positions, slots = [], [], [], []
        for index, prompt in enumerate(prompts):
            if len(decoded[index].token_ids) == new_tokens:
                continue
            start = computed[index]
            chunk = rows[index][start:][: prompt.chunk]
            places = torch.arange(start, start + len(chunk))
            blocks = torch.tensor(tables[index])[places // block_size]
            active.append(index)
            chunks.append(chunk)
            positions.append(places)
            slots.append(blocks * block_size + places % block_size)
            computed[index] += len(chunk)
        counts = torch.tensor([0] + [len(chunk) for chunk in chunks])
        batch = Batch(
            positions=torch.cat(positions).to(device),
            slot_mapping=torch.cat(slots).to(device),
            block_table=torch.tensor(
                [tables[index] for index in active], dtype=torch.int32, device=device
            ),
            query_start=counts.cumsum(0).int().to(device),
            context_lens=torch.tensor(
                [computed[index] for index in active], dtype=torch.int32, device=device
            ),
            max_query_len=max(len(chunk) for chunk in chunks),
        )
        hidden = model.forward(torch.cat(chunks), batch, k_caches, v_caches)
        for index, end in zip(active, batch.query_start[1:].tolist(), strict=True):
            if computed[index] < len(rows[index]):
                continue
            logits = model.logits(hidden[end - 1 : end])[0]
            answer = decoded[index]
            answer.logits.append(logits)
            answer.token_ids.append(int(logits.argmax()))
            following = answer.token_ids[-1]
            if forced is not None:
                following = forced[index][len(answer.token_ids) - 1]
            row = model.embed(torch.tensor([following], device=device))
            rows[index] = torch.cat((rows[index], row))
    return decoded


def _embed(model: LlavaModel, prompt: Prompt) -> torch.Tensor:
    ids = torch.tensor(prompt.token_ids, device=model.device)
    rows = model.embed(ids)
    if prompt.pixels is not None:
        pixels = prompt.pixels.to(model.device, model.dtype)
        features = model.encode_images(patch_rows(pixels, model.config.vision.patch_size))
        rows[ids == model.config.image_token_id] = features.flatten(0, 1)
    return rows
