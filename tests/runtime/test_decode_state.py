"""The rows of a decoding batch: what a fill leaves of the one before it."""

from __future__ import annotations

import torch
from support.pictures import random_pictures
from support.runtime import Sink

from llava_engine import SamplingParams
from llava_engine.runtime.decode_state import DecodeState
from llava_engine.runtime.sequence import Picture, Sequence

VOCAB, IMAGE = 10, 9


def state() -> DecodeState:
    return DecodeState(
        max_batch=3,
        max_model_len=32,
        block_size=4,
        vocab_size=VOCAB,
        image_token_id=IMAGE,
        device=torch.device("cpu"),
    )


def sequence(ids: list[int], blocks: list[int], penalty: float = 1.0) -> Sequence:
    sampling = SamplingParams(repetition_penalty=penalty)
    made = Sequence(ids, (), sampling, 9, frozenset({2}), Sink(), seed=0)
    made.computed = len(ids) - 1
    made.block_table = blocks
    return made


def logits(rows: int, **values: float) -> torch.Tensor:
    made = torch.zeros(rows, VOCAB)
    for name, value in values.items():
        made[:, int(name.removeprefix("token"))] = value
    return made


def test_rows_stand_where_their_sequences_do() -> None:
    rows = state()
    rows.fill([sequence([5, 6, 7, 8, 4, 3], [6, 2]), sequence([7], [5])], [9, 1], 0)
    batch = rows.batch(3)
    assert rows.token(3).tolist() == [3, 7, 0]
    assert batch.positions.tolist() == [5, 0, 0]
    assert batch.slot_mapping.tolist() == [2 * 4 + 1, 5 * 4, -1]
    assert batch.context_lens.tolist() == [6, 1, 0]
    assert batch.block_table.tolist() == [[6, 2] + [0] * 6, [5] + [0] * 7, [0] * 8]
    assert batch.query_start.tolist() == [0, 1, 2, 3]
    rows.advance(logits(3, token1=1.0))
    assert rows.token(3).tolist() == [1, 7, 0]
    assert batch.positions.tolist() == [6, 0, 0]
    assert batch.slot_mapping.tolist() == [2 * 4 + 2, -1, -1]
    assert batch.context_lens.tolist() == [7, 0, 0]
    assert rows.ring[0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_a_row_forgets_what_the_one_before_it_had_seen() -> None:
    rows = state()
    rows.fill([sequence([1, 3], [0], penalty=2.0)], [9], 0)
    rows.advance(logits(1, token1=1.0, token4=0.9))
    assert rows.ring[0, 0, 1] == 4
    rows.fill([sequence([3, 5], [0], penalty=2.0)], [9], 1)
    rows.advance(logits(1, token1=1.0, token4=0.9))
    assert rows.ring[1, 0, 1] == 1
    rows.advance(logits(1, token1=1.0, token4=0.9))  # by now it has seen that one itself
    assert rows.ring[2, 0, 1] == 4


def test_a_picture_in_the_prompt_counts_as_its_token() -> None:
    rows = state()
    pictured = sequence([-5, 3], [0], penalty=2.0)
    pictured.pictures = (Picture(b"", 0, 1, random_pictures(0, 1, 1)[0]),)
    rows.fill([pictured], [9], 0)
    rows.advance(logits(1, token9=1.0, token4=0.9))
    assert rows.ring[0, 0, 1] == 4


def test_clear_leaves_every_row_idle() -> None:
    rows = state()
    rows.fill([sequence([3, 5], [1])], [9], 0)
    rows.clear()
    assert rows.batch(3).context_lens.tolist() == [0, 0, 0]
    assert rows.batch(3).slot_mapping.tolist() == [-1, -1, -1]
    rows.advance(logits(3, token1=1.0))
    assert not rows.ring.any()
