"""Sampling against transformers' logits processors, published Philox vectors and softmax itself."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_engine.kernels.sampling import candidates, penalised, philox4x32, sample

# temperature, top_k, top_p, repetition_penalty
SETTINGS = [
    (1.0, 0, 1.0, 1.0),
    (0.7, 0, 1.0, 1.0),
    (1.6, 4, 1.0, 1.0),
    (1.0, 0, 0.8, 1.0),
    (0.9, 6, 0.7, 1.3),
    (2.0, 0, 0.95, 0.6),
    (0.3, 3, 0.99, 1.8),
]


def draw(
    logits: torch.Tensor,
    *,
    temperature: float | list[float] = 0.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    repetition_penalty: float | list[float] = 1.0,
    seen: torch.Tensor | None = None,
    seed: int | list[int] = 0,
    position: int | list[int] = 0,
) -> torch.Tensor:
    rows = len(logits)

    def column(value: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    out = torch.full((rows,), -7)
    sample(
        out,
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(repetition_penalty, torch.float32),
        seen,
        column(seed, torch.int64),
        column(position, torch.int64),
    )
    return out


def transformers_scores(
    logits: torch.Tensor, ids: torch.Tensor, setting: tuple[float, int, float, float]
) -> torch.Tensor:
    temperature, top_k, top_p, penalty = setting
    chain = LogitsProcessorList()
    if penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    return chain(ids, logits.clone())


def seen_table(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.zeros(len(ids), vocab_size, dtype=torch.bool).scatter_(1, ids, True)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """kat_vectors of the Random123 distribution, philox4x32 with 10 rounds."""
    assert tuple(philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()) == expected


def test_noise_words_lie_where_the_docstring_says() -> None:
    """Among equal logits the largest Gumbel noise is the smallest word of the row's stream."""
    seed, position, vocab_size = 0x0123456789ABCDEF, 0x89, 10
    words: list[int] = []
    for block in range(3):
        counter = torch.tensor([block, 0, position, 0])
        key = torch.tensor([0x89ABCDEF, 0x01234567])
        words += philox4x32(counter, key).tolist()
    (token,) = draw(torch.zeros(1, vocab_size), temperature=1.0, seed=seed, position=position)
    assert token == min(range(vocab_size), key=words.__getitem__)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [5, 1001])
def test_candidates_are_transformers(
    setting: tuple[float, int, float, float], vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, vocab_size, generator=generator) * 4
    ids = torch.randint(0, vocab_size, (64, 9), generator=generator)
    temperature, top_k, top_p, penalty = (
        torch.full((64,), value, dtype=torch.int32 if isinstance(value, int) else torch.float32)
        for value in setting
    )
    before = logits.clone()
    scores = candidates(
        penalised(logits, penalty, seen_table(ids, vocab_size)), temperature, top_k, top_p
    )
    torch.testing.assert_close(scores, transformers_scores(logits, ids, setting), rtol=1e-6, atol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_follow_softmax(setting: tuple[float, int, float, float], vary: str) -> None:
    """Chi-square of 20,000 draws against the softmax of transformers' scores."""
    draws = 20_000
    generator = torch.Generator().manual_seed(17)
    logits = torch.randn(1, 11, generator=generator) / 2
    ids = torch.tensor([[0, 3, 4, 9]])
    temperature, top_k, top_p, penalty = setting
    tokens = draw(
        logits.expand(draws, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        seen=seen_table(ids, 11).expand(draws, -1),
        **{vary: list(range(draws))},
    )
    expected = draws * transformers_scores(logits, ids, setting)[0].double().softmax(-1)
    counts = tokens.bincount(minlength=11).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() > 1
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = torch.tensor(int(kept.sum()) - 1, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 500, generator=generator)
    assert torch.equal(draw(logits), logits.argmax(-1))
    logits[:, [300, 40, 499]] = 9.0
    assert draw(logits).tolist() == [40] * 7
    # top-k and top-p mean nothing to a greedy row.
    assert draw(logits, top_k=1, top_p=0.01).tolist() == [40] * 7


def test_the_penalty_counts_for_greedy_rows_and_only_for_its_row() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0]] * 3 + [[-3.0, -2.5, -1.0]])
    seen = torch.tensor([[True, False, False]] * 3 + [[False, False, True]])
    tokens = draw(logits, repetition_penalty=[1.0, 2.0, 1.2, 3.0], seen=seen)
    assert tokens.tolist() == [0, 1, 0, 1]


def test_a_sole_candidate_is_always_drawn() -> None:
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(4))
    best = logits.argmax(-1)
    rows = list(range(300))
    assert torch.equal(draw(logits, temperature=3.0, top_k=1, position=rows), best)
    assert torch.equal(draw(logits, temperature=3.0, top_p=1e-12, position=rows), best)
    only = torch.full((300, 50), -torch.inf)
    only[:, 31] = -4.0
    assert draw(only, temperature=1.0, position=rows).tolist() == [31] * 300


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(4))
    rows = list(range(100))
    everything = draw(logits, temperature=1.0, position=rows)
    assert torch.equal(draw(logits, temperature=1.0, position=rows, top_k=6), everything)
    assert torch.equal(draw(logits, temperature=1.0, position=rows, top_k=900), everything)


def test_a_rows_token_depends_on_nothing_but_its_own_row() -> None:
    generator = torch.Generator().manual_seed(8)
    rows = 24
    logits = torch.randn(rows, 333, generator=generator) * 3
    ids = torch.randint(0, 333, (rows, 20), generator=generator)
    seen = seen_table(ids, 333)
    cycle = (SETTINGS + [(0.0, 0, 1.0, 1.0), (0.0, 5, 0.5, 1.5)]) * 3
    settings = cycle[:rows]
    seeds = torch.randint(0, 2**62, (rows,), generator=generator).tolist()
    positions = torch.randint(0, 4000, (rows,), generator=generator).tolist()

    def run(order: list[int]) -> list[int]:
        temperature, top_k, top_p, penalty = zip(*(settings[i] for i in order), strict=True)
        return draw(
            logits[order],
            temperature=list(temperature),
            top_k=list(top_k),
            top_p=list(top_p),
            repetition_penalty=list(penalty),
            seen=seen[order],
            seed=[seeds[i] for i in order],
            position=[positions[i] for i in order],
        ).tolist()

    together = run(list(range(rows)))
    assert [run([row])[0] for row in range(rows)] == together
    backwards = list(range(rows))[::-1]
    assert run(backwards) == together[::-1]


def test_seed_and_position_matter() -> None:
    logits = torch.zeros(200, 1000)
    rows = list(range(200))
    assert len(set(draw(logits, temperature=1.0, seed=rows).tolist())) > 150
    assert len(set(draw(logits, temperature=1.0, position=rows).tolist())) > 150
    high = [row << 32 for row in rows]
    assert len(set(draw(logits, temperature=1.0, seed=high).tolist())) > 150
    assert len(set(draw(logits, temperature=1.0).tolist())) == 1


def test_schema_and_fake() -> None:
    rows = torch.arange(4)
    arguments = (
        torch.zeros(4, dtype=torch.int64),
        torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.0, 1, 2, 0.5]),
        torch.tensor([0, 2, 0, 3], dtype=torch.int32),
        torch.tensor([1.0, 1, 0.5, 0.9]),
        torch.tensor([1.0, 1, 1.5, 1]),
        torch.ones(4, 6, dtype=torch.bool),
        rows,
        rows,
    )
    torch.library.opcheck(
        torch.ops.llava_engine.sample.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
