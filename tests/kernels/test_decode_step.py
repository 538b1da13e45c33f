"""The end of a decoding step against rows kept as plain Python numbers."""

from __future__ import annotations

import random

import pytest
from support.decode_rows import Rows, at_random


@pytest.mark.parametrize("seed", range(40))
def test_rows_go_on_finish_and_stay_idle_as_written_out(seed: int) -> None:
    chance = random.Random(seed)
    rows = at_random(chance, chance.choice([1, 2, 7, 33]))
    for _ in range(12):
        rows.step([chance.randrange(rows.vocab) for _ in range(rows.count)])


def test_the_last_entry_before_the_step_count_wraps_and_the_first_after_it() -> None:
    rows = Rows(count=1, vocab=5, block_size=4, ring_steps=3)
    rows.admit(0, position=3, remaining=9, eos=[])
    rows.set_step(2**31 - 1)
    assert rows.step([2]) == [(-(2**31), 2, 0, 0)]
    assert rows.step([3]) == [(-(2**31) + 1, 3, 0, 0)]


def test_nothing_but_the_rows_own_entries_is_written() -> None:
    rows = Rows(count=2, vocab=5, block_size=4, ring_steps=4, ring_rows=6)
    rows.admit(1, position=0, remaining=1, eos=[])
    assert rows.step([4, 4]) == [None, (1, 4, 1, 0)]
    assert rows.untouched() == 4 * 6 - 1
