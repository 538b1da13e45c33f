"""Choosing the next token of each row: greedy or drawn, each row under its own parameters.

The draw is Gumbel-max with Philox4x32-10 noise: token v of a row gets the logit plus
-log(-log1p(-u)), u made of word v % 4 of the counter (v // 4, 0, position, 0) under the row's seed,
and the largest wins. So it is the same argmax as the greedy one, needs no sum over the vocabulary,
and depends on the row's own logits, seed and position alone.
"""

from __future__ import annotations

import torch

from llava_engine.kernels.library import define

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LARGEST_UNIFORM = 1 - 2.0**-24  # a uniform of 1 would give noise of -inf, even to a sole candidate


def sample(
    out: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seen: torch.Tensor | None,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """Write each row's next token to `out`.

    out: int64 [R]. logits: float32 [R, V], left as they are.
    temperature: float32 [R]; 0 is greedy: the largest penalised logit, the lowest id among equals.
    top_k: int32 [R]; 0 keeps all. Tokens equal to the k-th are kept too.
    top_p: float32 [R], in (0, 1]; 1 keeps all. Of equal tokens at the edge the lower ids are kept.
    repetition_penalty: float32 [R]; seen: bool [R, V], the tokens it applies to, or None where no
        row has a penalty.
    seed: int64 [R]. position: int64 [R], in [0, 2**32): which of its tokens the row samples.

    Penalty, temperature, top-k and top-p come in this order and mean what transformers' logits
    processors mean. Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    _sample(out, logits, temperature, top_k, top_p, repetition_penalty, seen, seed, position)


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The ten-round Philox4x32 block.

    counter: int64 [..., 4]; key: int64 [..., 2], broadcast to the counter's rows. Both hold words
    in [0, 2**32), and so does the result, int64 [..., 4].
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # A product's upper bits may wrap into the sign; the mask after the shift drops the copies.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _gumbel(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, vocab_size]."""
    lanes = torch.arange(-(-vocab_size // 4), device=seed.device)
    counter = torch.zeros((len(seed), len(lanes), 4), dtype=torch.int64, device=seed.device)
    counter[..., 0] = lanes
    counter[..., 2] = position.unsqueeze(1)
    key = torch.stack((seed & _MASK, (seed >> 32) & _MASK), dim=-1).unsqueeze(1)
    words = philox4x32(counter, key).flatten(1)[:, :vocab_size]
    # Fine near 0, where the winners come from, and never 0 itself.
    uniform = (words.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp_(max=_LARGEST_UNIFORM))).float()


def _sample_reference(
    out: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seen: torch.Tensor | None,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> None:
    if seen is not None and bool((repetition_penalty != 1).any()):
        logits = penalised(logits, repetition_penalty, seen)
    out.copy_(logits.argmax(dim=-1))
    drawn = temperature > 0
    if bool(drawn.any()):
        rows = drawn.nonzero().squeeze(1)
        scores = candidates(logits[rows], temperature[rows], top_k[rows], top_p[rows])
        noise = _gumbel(seed[rows], position[rows], scores.shape[1])
        out[rows] = (scores + noise).argmax(dim=-1)


def penalised(
    logits: torch.Tensor, repetition_penalty: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Logits [R, V] with each row's penalty [R] on its seen tokens [R, V]."""
    penalty = repetition_penalty.unsqueeze(1)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Scores [R, V], -inf where top-k and top-p drop a token; temperature, top_k, top_p: [R]."""
    scores = _keep_top_k(logits / temperature.unsqueeze(1), top_k)
    return _keep_top_p(scores, top_p)


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    vocab_size = scores.shape[1]
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    largest = int(k.where(k < vocab_size, 0).max())
    if largest == 0:
        return scores
    ranked = scores.topk(largest).values
    edge = ranked.gather(1, (k.clamp(max=largest) - 1).unsqueeze(1))
    return scores.masked_fill((scores < edge) & (k < vocab_size).unsqueeze(1), -torch.inf)


def _keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    if bool((top_p >= 1).all()):
        return scores
    # Summed from the least likely up, as transformers does: the rounding falls the same way.
    descending, order = scores.sort(dim=-1, descending=True, stable=True)
    tail = descending.flip(-1).softmax(dim=-1).cumsum(dim=-1).flip(-1)
    dropped = (tail <= 1 - top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1)
    dropped[:, 0] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)


_sample = define(
    "sample(Tensor(a!) out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor repetition_penalty, Tensor? seen, Tensor seed, Tensor position) -> ()",
    _sample_reference,
)
