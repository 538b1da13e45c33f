"""EagerLoop as a DecodeLoop: when a run ends, and what stops it."""

from __future__ import annotations

import pytest
import torch

from llava_engine.runtime.decode_loop import DecodeLoop, EagerLoop


class Steps:
    """Writes a ring as the device would; row r finishes with its `lengths[r]`-th token."""

    def __init__(self, lengths: list[int], ring_steps: int = 8) -> None:
        self.left = list(lengths)
        self.ring = torch.zeros((ring_steps, len(lengths), 4), dtype=torch.int32)
        self.step = 0
        self.rows: list[int] = []

    def __call__(self, rows: int) -> None:
        self.rows.append(rows)
        for row in range(rows):
            if self.left[row]:
                self.left[row] -= 1
                entry = [self.step + 1, 100 * row + self.step, int(self.left[row] == 0), 0]
                self.ring[self.step % len(self.ring), row] = torch.tensor(entry)
        self.step += 1


def drained(loop: DecodeLoop) -> list[tuple[int, int, int, bool]]:
    events, ended = [], False
    while not ended:
        more, ended = loop.wait(None)
        events += [(e.step, e.row, e.token, e.finished) for e in more]
    return events


def test_a_run_ends_when_every_row_has() -> None:
    steps = Steps([2, 1, 3])
    loop = EagerLoop(steps, steps.ring)
    loop.run(3, 0, 8, 0)
    assert drained(loop) == [
        (0, 0, 0, False),
        (0, 1, 100, True),
        (0, 2, 200, False),
        (1, 0, 1, True),
        (1, 2, 201, False),
        (2, 2, 202, True),
    ]
    assert steps.rows == [3, 3, 3]
    assert loop.wait(None) == ([], True)


@pytest.mark.parametrize(("stop_at", "steps_run"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_a_run_ends_when_few_rows_are_left(stop_at: int, steps_run: int) -> None:
    steps = Steps([4, 1, 2, 3])
    loop = EagerLoop(steps, steps.ring)
    loop.run(4, 0, 8, stop_at)
    drained(loop)
    assert steps.step == steps_run


def test_a_run_has_no_more_steps_than_asked_for_and_the_next_goes_on_around_the_ring() -> None:
    steps = Steps([20])
    loop = EagerLoop(steps, steps.ring)
    for first in (0, 5, 10):
        loop.run(1, first, 5, 0)
        assert [step for step, *_ in drained(loop)] == list(range(first, first + 5))


def test_stop_ends_a_run_but_never_before_its_first_step() -> None:
    steps = Steps([20])
    loop = EagerLoop(steps, steps.ring)
    loop.stop()  # no run is on
    loop.run(1, 0, 8, 0)
    assert len(loop.wait(None)[0]) == 1
    assert not loop.wait(None)[1]
    loop.stop()
    assert loop.wait(None) == ([], True)
    assert steps.step == 2, "a step was started after the stop"
    loop.run(1, 2, 5, 0)
    loop.stop()
    assert [step for step, *_ in drained(loop)] == [2]


def test_one_run_at_a_time() -> None:
    steps = Steps([20])
    loop = EagerLoop(steps, steps.ring)
    loop.run(1, 0, 8, 0)
    with pytest.raises(ValueError, match="a run is on"):
        loop.run(1, 0, 8, 0)


def test_a_failed_step_ends_the_run() -> None:
    steps = Steps([20])

    def failing(rows: int) -> None:
        if steps.step == 1:
            raise KeyError("planted")
        steps(rows)

    loop = EagerLoop(failing, steps.ring)
    loop.run(1, 0, 8, 0)
    assert not loop.wait(None)[1]
    with pytest.raises(KeyError):
        loop.wait(None)
    assert loop.wait(None) == ([], True)
    steps.step = 2
    loop.run(1, 2, 1, 0)
    assert len(drained(loop)) == 1


def test_a_closed_loop_can_still_be_stopped() -> None:
    steps = Steps([20])
    loop = EagerLoop(steps, steps.ring)
    loop.run(1, 0, 8, 0)
    loop.close()
    loop.stop()
    loop.wake()
    loop.close()
    assert loop.wait(None) == ([], True)
    assert steps.step == 0
