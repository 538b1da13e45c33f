"""The end of a decoding step: sampled tokens go to the host and become the next step's inputs."""

from __future__ import annotations

import torch

from llava_engine.kernels.library import define


def advance(
    token: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    context_len: torch.Tensor,
    sample_position: torch.Tensor,
    remaining: torch.Tensor,
    seen: torch.Tensor,
    step: torch.Tensor,
    ring: torch.Tensor,
    sampled: torch.Tensor,
    eos: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    """Tell the host what each active row sampled, and make the row ready for the next step.

    sampled: int64 [R]; the next step's `token`, int64 [R].
    position: int64 [R], of the token in its sequence. slot: int64 [R], its place in the KV cache,
        -1 in an idle row. context_len: int32 [R], with this token; 0 in an idle row.
    sample_position: int64 [R], which of its tokens the row samples (kernels.sampling).
    remaining: int32 [R], tokens that the row may still sample, this one included.
    seen: bool [R, V], where the token is noted. step: int64 [1], counted up by one.
    ring: int32 [ring_steps, rows >= R, 4] in pinned host memory (beside CUDA tensors; or anything
        the kernel can write). Entry [step % ring_steps, row] becomes (step + 1, token, flags, 0) in
        one 16-byte store; the first wraps around as int32 does. Bit 0 of the flags: the row has
        finished.
    eos: int64 [R, E], tokens that finish the row; -1 matches none.
    block_table: int32 [R, W]; has the block of the next position, unless no step follows.

    A row finishes by a token in `eos` or when nothing remains; it is idle then: context_len 0 and
    slot -1. Idle rows write no entry and stay as they are.
    """
    _advance(
        token,
        position,
        slot,
        context_len,
        sample_position,
        remaining,
        seen,
        step,
        ring,
        sampled,
        eos,
        block_table,
        block_size,
    )


def _advance_reference(
    token: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    context_len: torch.Tensor,
    sample_position: torch.Tensor,
    remaining: torch.Tensor,
    seen: torch.Tensor,
    step: torch.Tensor,
    ring: torch.Tensor,
    sampled: torch.Tensor,
    eos: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    active = context_len > 0
    finished = active & ((sampled.unsqueeze(1) == eos).any(dim=1) | (remaining <= 1))
    entries = torch.stack(
        ((step + 1).expand_as(sampled), sampled, finished.long(), torch.zeros_like(sampled)), dim=1
    ).int()
    rows = active.nonzero().squeeze(1)
    ring[int(step) % len(ring), rows.to(ring.device)] = entries[rows].to(ring.device)
    step += 1

    slot[finished] = -1
    context_len[finished] = 0
    going = (active & ~finished).nonzero().squeeze(1)
    token[going] = sampled[going]
    position[going] += 1
    context_len[going] += 1
    sample_position[going] += 1
    remaining[going] -= 1
    seen[going, sampled[going]] = True
    place = position[going]
    slot[going] = block_table[going, place // block_size].long() * block_size + place % block_size


_advance = define(
    "advance(Tensor(a!) token, Tensor(b!) position, Tensor(c!) slot, Tensor(d!) context_len, "
    "Tensor(e!) sample_position, Tensor(f!) remaining, Tensor(g!) seen, Tensor(h!) step, "
    "Tensor(i!) ring, Tensor sampled, Tensor eos, Tensor block_table, int block_size) -> ()",
    _advance_reference,
)
