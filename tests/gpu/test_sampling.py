"""Sampling on the GPU draws the very tokens that the reference draws on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.gpu import NEEDS_GPU

from llava_engine.kernels.sampling import philox4x32, sample

pytestmark = NEEDS_GPU

# temperature, top_k, top_p, repetition_penalty
SETTINGS = [
    (0.0, 0, 1.0, 1.0),
    (0.0, 3, 0.5, 1.4),
    (1.0, 0, 1.0, 1.0),
    (0.7, 0, 1.0, 1.0),
    (1.6, 4, 1.0, 1.0),
    (1.0, 0, 0.8, 1.0),
    (0.9, 6, 0.7, 1.3),
    (2.0, 0, 0.95, 0.6),
    (0.3, 3, 0.99, 1.8),
    (1.0, 1, 1.0, 1.0),
    (3.0, 0, 1e-12, 1.0),
    (1.0, 50, 0.9, 1.1),
    (1e6, 0, 1.0, 1.0),
    (1.0, 10_000_000, 1.0, 1.0),
]


def both(logits: torch.Tensor, seen: torch.Tensor | None, seed: int) -> tuple[torch.Tensor, ...]:
    """Tokens of the GPU and of the CPU, the settings taken in turn."""
    rows = len(logits)
    generator = torch.Generator().manual_seed(seed)
    chosen = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    temperature, top_k, top_p, penalty = zip(*chosen, strict=True)
    columns = (
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(penalty) if seen is not None else torch.ones(rows),
        seen,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(0, 2**32, (rows,), generator=generator),
    )
    answers = []
    for device in ("cuda", "cpu"):
        out = torch.full((rows,), -7, device=device)
        placed = [None if column is None else column.to(device) for column in columns]
        sample(out, logits.to(device), *placed)
        answers.append(out.cpu())
    return tuple(answers)


@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 5, 1001, 32064])
def test_tokens_are_the_references(vocab_size: int, with_seen: bool) -> None:
    generator = torch.Generator()
    seed = generator.seed()
    print("seed", seed)
    rows = 1400 if vocab_size < 2000 else 280
    logits = torch.randn(rows, vocab_size, generator=generator) * 4
    seen = torch.rand(rows, vocab_size, generator=generator) < 0.3 if with_seen else None
    ours, reference = both(logits, seen, seed)
    # The two may part where float32 sums or logarithms round apart at an edge: once in a thousand
    # would already be too often.
    assert (ours != reference).sum() <= rows // 1000


@pytest.mark.parametrize("vocab_size", [9, 700, 5000])
def test_ties_go_the_references_way(vocab_size: int) -> None:
    """Few distinct logits, so that top-k and top-p cut between equals; zeros of both signs too."""
    generator = torch.Generator()
    seed = generator.seed()
    print("seed", seed)
    logits = torch.randint(-3, 4, (1400, vocab_size), generator=generator).float()
    logits[::3] *= -1
    ours, reference = both(logits, None, seed)
    # Among equals an edge falls exactly between two ids, which a rounded sum may miss by one.
    assert (ours != reference).float().mean() <= 0.01


def test_infinities_are_never_drawn() -> None:
    logits = torch.full((280, 500), -torch.inf)
    logits[:, 31] = -4.0
    ours, _ = both(logits, None, 1)
    assert (ours == 31).all()


def test_noise_words_lie_where_the_docstring_says() -> None:
    seed, position, vocab_size = 0x0123456789ABCDEF, 0x89, 10
    words: list[int] = []
    for block in range(3):
        counter = torch.tensor([block, 0, position, 0])
        words += philox4x32(counter, torch.tensor([0x89ABCDEF, 0x01234567])).tolist()
    out = torch.full((1,), -7, device="cuda")
    one = torch.ones(1, device="cuda")
    sample(
        out,
        torch.zeros(1, vocab_size, device="cuda"),
        one,
        torch.zeros(1, dtype=torch.int32, device="cuda"),
        one,
        one,
        None,
        torch.tensor([seed], device="cuda"),
        torch.tensor([position], device="cuda"),
    )
    assert int(out) == min(range(vocab_size), key=words.__getitem__)
