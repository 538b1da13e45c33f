"""A step for kernels.prefill, in one call and by the ops that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_engine.kernels.prefill import StepInputs, pack, prefill_step
from llava_engine.kernels.sampling import sample
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel

BLOCK_SIZE = 16
LENGTHS = [(1, 37), (23, 23), (40, 77), (9, 9)]
"""(new, context) of a step's sequences."""
WANTED = [0, 63, 72]
"""The last rows of the first, the third and the fourth."""
# temperature, top_k, top_p, repetition_penalty
GREEDY = [(0.0, 0, 1.0, 1.0)] * 3
DRAWN = [(1.0, 0, 1.0, 1.0), (0.0, 0, 1.0, 1.0), (1.7, 9, 0.9, 1.0)]
PENALISED = [(0.0, 0, 1.0, 1.8), (0.0, 0, 1.0, 1.0), (1.0, 0, 0.8, 0.6)]
# The step's row, the first of the features', and how many.
PLACES = [(2, 0, 5), (24, 3, 8), (32, 0, 0), (60, 1, 4)]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What LlavaModel.prefill takes but for its caches; `arrays` is what was uploaded."""

    arrays: StepInputs[npt.NDArray[Any]]
    tokens: torch.Tensor
    uploaded: torch.Tensor
    sizes: list[int]
    embedding: torch.Tensor
    features: list[torch.Tensor]
    feature_rows: list[int]
    head: torch.Tensor
    max_query_len: int


def make_step(
    model: LlavaModel,
    *,
    lengths: list[tuple[int, int]] = LENGTHS,
    wanted: list[int] = WANTED,
    settings: list[tuple[float, int, float, float]] = GREEDY,
    places: list[tuple[int, int, int]] = PLACES,
    seed: int = 0,
) -> Step:
    """Random tokens, features and earlier keys of sequences over blocks dealt out of order."""
    chance, text = np.random.default_rng(seed), model.config.text
    counts = [-(-context // BLOCK_SIZE) for _, context in lengths]
    blocks = chance.permutation(sum(counts)).tolist()
    table = np.zeros((len(lengths), max(counts)), np.int32)
    positions, slots = [], []
    for row, ((new, context), count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = [blocks.pop() for _ in range(count)]
        places_of = np.arange(context - new, context)
        positions.append(places_of)
        slots.append(
            table[row, places_of // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
            + places_of % BLOCK_SIZE
        )
    rows, sampled = sum(new for new, _ in lengths), len(wanted)
    settings = settings[:sampled]
    temperature, top_k, top_p, penalty = (
        [setting[index] for setting in settings] for index in range(4)
    )
    seen = [
        row * text.vocab_size + token
        for row, factor in enumerate(penalty)
        if factor != 1.0
        for token in chance.choice(text.vocab_size, text.vocab_size // 2, replace=False).tolist()
    ]
    arrays = StepInputs(
        token_ids=chance.integers(0, text.vocab_size, rows),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        wanted=np.array(wanted, np.int64),
        seed=chance.integers(-(2**62), 2**62, sampled),
        position=chance.integers(0, 2**32, sampled),
        seen_at=np.array(seen, np.int64),
        block_table=table,
        query_start=np.cumsum([0, *(new for new, _ in lengths)], dtype=np.int32),
        context_lens=np.array([context for _, context in lengths], np.int32),
        top_k=np.array(top_k, np.int32),
        temperature=np.array(temperature, np.float32),
        top_p=np.array(top_p, np.float32),
        repetition_penalty=np.array(penalty, np.float32),
    )
    packed, sizes = pack(arrays)
    padded = torch.from_numpy(np.append(packed, np.zeros(40, np.uint8)))  # an upload's alignment
    shape = 12, text.hidden_size
    return Step(
        arrays=arrays,
        tokens=torch.full((sampled,), -7, device=model.device),
        uploaded=padded.to(model.device),
        sizes=sizes,
        embedding=model._decoder.embedding,
        features=[
            torch.from_numpy(chance.standard_normal(shape)).to(model.device, model.dtype)
            for _ in places
        ],
        feature_rows=[number for place in places for number in place],
        head=model._head,
        max_query_len=max(new for new, _ in lengths),
    )


def make_caches(model: LlavaModel, step: Step) -> list[list[torch.Tensor]]:
    """Keys and values of every layer, random, the same for the same step."""
    text = model.config.text
    blocks = int((-(-step.arrays.context_lens // BLOCK_SIZE)).sum())
    generator = torch.Generator().manual_seed(7)
    shape = blocks, text.num_kv_heads, BLOCK_SIZE, text.head_dim
    return [
        [
            torch.randn(shape, generator=generator).to(model.device, model.dtype)
            for _ in range(text.num_layers)
        ]
        for _ in "kv"
    ]


def in_one_call(model: LlavaModel, step: Step, caches: list[list[torch.Tensor]]) -> None:
    """The op."""
    decoder = model._decoder.in_one_call(None)
    assert decoder is not None
    prefill_step(
        step.tokens,
        step.uploaded,
        step.sizes,
        step.embedding,
        step.features,
        step.feature_rows,
        *caches,
        decoder,
        step.head,
        step.max_query_len,
    )


def composed(model: LlavaModel, step: Step, caches: list[list[torch.Tensor]]) -> torch.Tensor:
    """What the step samples, by one op after the other."""
    there = StepInputs(*(torch.from_numpy(array).to(model.device) for array in step.arrays))
    embeds = model.embed(there.token_ids)
    places = zip(*[iter(step.feature_rows)] * 3, strict=True)
    for features, (row, first, count) in zip(step.features, places, strict=True):
        embeds[row : row + count] = features[first : first + count]
    batch = Batch(
        positions=there.positions,
        slot_mapping=there.slot_mapping,
        block_table=there.block_table,
        query_start=there.query_start,
        context_lens=there.context_lens,
        max_query_len=step.max_query_len,
    )
    hidden = model.forward(embeds, batch, *caches, there.wanted)
    tokens = torch.full_like(step.tokens, -7)
    if len(tokens) == 0:
        return tokens
    logits = model.logits(hidden)
    seen = None
    if len(there.seen_at):
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=model.device)
        seen.view(-1)[there.seen_at] = True
    sample(
        tokens,
        logits,
        there.temperature,
        there.top_k,
        there.top_p,
        there.repetition_penalty,
        seen,
        there.seed,
        there.position,
    )
    return tokens


REFUSED: dict[str, Callable[[Step], Step]] = {
    "fewer bytes": lambda s: replace(s, uploaded=s.uploaded[:-44]),
    "more tokens": lambda s: replace(s, sizes=[s.sizes[0] + 9, *s.sizes[1:]]),
    "more blocks": lambda s: replace(s, sizes=[*s.sizes[:2], 1 << 40, *s.sizes[3:]]),
    "a negative size": lambda s: replace(s, sizes=[*s.sizes[:4], -1]),
    "tokens of fewer": lambda s: replace(s, tokens=s.tokens[:-1]),
    "rows behind the step's": lambda s: replace(s, feature_rows=[70, 0, 5, *s.feature_rows[3:]]),
    "rows before the step's": lambda s: replace(s, feature_rows=[-20, 0, 5, *s.feature_rows[3:]]),
    "rows behind the features'": lambda s: replace(s, feature_rows=[2, 9, 5, *s.feature_rows[3:]]),
    "a negative count": lambda s: replace(s, feature_rows=[2, 0, -1, *s.feature_rows[3:]]),
    "features of no place": lambda s: replace(s, feature_rows=s.feature_rows[3:]),
    "narrower features": lambda s: replace(s, features=[f[:, 1:].contiguous() for f in s.features]),
    "a narrower head": lambda s: replace(s, head=s.head[:, 1:].contiguous()),
}
"""Changes of a step whose sizes then do not belong together."""
