"""Rotary positions and the append to the paged KV cache, in one pass over a step's q, k and v."""

from __future__ import annotations

import torch

from llava_engine.kernels.library import define


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rotate q and k in place and write k and v to their cache slots.

    q: [T, Hq, D]; k, v: [T, Hkv, D], of one dtype. They may be column slices of one matrix: the
        last two dimensions are dense, the first has any stride.
    cos_sin: float32 [max_len, D], the halves [cos | sin] of the angle position * frequency.
    positions: int64 [T], in [0, max_len).
    slot_mapping: int64 [T]; slot = block * block_size + offset, -1 where nothing is stored. No slot
        stands there twice.
    k_cache, v_cache: [num_blocks, Hkv, block_size, D], of q's dtype.

    The rotation pairs dimension i with i + D / 2 (GPT-NeoX's layout, as in transformers' Llama) and
    is computed in float32 (Su et al. 2021).
    """
    _rope_append(q, k, v, cos_sin, positions, slot_mapping, k_cache, v_cache)


def _rope_append_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        left, right = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1))
    if bool((slot_mapping < 0).any()):
        stored = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[stored], k[stored], v[stored]
    block_size = k_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


_rope_append = define(
    "rope_append(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos_sin, Tensor positions, "
    "Tensor slot_mapping, Tensor(c!) k_cache, Tensor(d!) v_cache) -> ()",
    _rope_append_reference,
)
