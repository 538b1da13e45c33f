"""The native decode loop launches ahead, loses nothing and never hangs, on a device of our own."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.fake_device import (
    GRAPH,
    PATIENCE,
    SOURCES,
    FakeDevice,
    Tokens,
    compile_native,
)

from llava_engine.runtime.decode_loop import DeviceFailed, TokenEvent
from llava_engine.runtime.native_loop import NativeLoop

ILLEGAL_ADDRESS = 700  # cudaErrorIllegalAddress


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # -Bsymbolic: a CUDA that torch has loaded must not take the fake one's place.
    made = tmp_path_factory.mktemp("native") / "decode_loop.so"
    return compile_native(made, SOURCES, "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic")


@pytest.fixture
def device(library: Path) -> Iterator[FakeDevice]:
    with FakeDevice(library) as device:
        yield device


def random_tokens(steps: int, rows: int, seed: int = 0) -> Tokens:
    draw = random.Random(seed)
    return [[draw.randrange(32064) for _ in range(rows)] for _ in range(steps)]


def start(
    device: FakeDevice,
    loop: NativeLoop,
    lengths: list[int],
    *,
    steps: int = 16,
    first: int = 0,
    stop_at: int = 0,
) -> Tokens:
    tokens = random_tokens(steps, len(lengths), first)
    device.fill(tokens, lengths, first)
    loop.prepare(len(lengths))
    loop.run(len(lengths), first, steps, stop_at)
    return tokens


def rest(loop: NativeLoop) -> list[TokenEvent]:
    """All events until the run has ended. One wait may be for nothing: it was woken before."""
    events: list[TokenEvent] = []
    ended, empty = False, 0
    while not ended:
        new, ended = loop.wait(PATIENCE)
        empty += not new and not ended
        assert empty <= 1, "nothing came"
        events += new
    return events


def until_failure(loop: NativeLoop, match: str) -> list[TokenEvent]:
    """All events until the loop says that the device has failed."""
    got: list[TokenEvent] = []
    with pytest.raises(DeviceFailed, match=match):
        while True:
            new, ended = loop.wait(PATIENCE)
            assert new and not ended, "nothing came"
            got += new
    return got


def brief(events: list[TokenEvent]) -> list[tuple[int, int, int, bool]]:
    return [(event.step, event.row, event.token, event.finished) for event in events]


def expected(
    tokens: Tokens, lengths: list[int], steps: int, first: int = 0
) -> list[tuple[int, int, int, bool]]:
    return [
        (first + step, row, tokens[step][row], step + 1 == length)
        for step in range(steps)
        for row, length in enumerate(lengths)
        if step < length
    ]


def in_thread(call: object) -> threading.Thread:
    assert callable(call)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_tokens_are_complete_and_in_order_over_many_runs(library: Path, ahead: int) -> None:
    """More rows than one call takes, a ring that wraps, and never more in flight than asked for."""
    draw = random.Random(ahead)
    before = time.monotonic_ns()
    with FakeDevice(library, rows=300, ring_steps=32) as device:
        device.allow(2**40)
        loop = device.loop(ahead=ahead)
        first = 0
        for _ in range(30):
            lengths = [draw.randint(1, 40) for _ in range(draw.choice((1, 2, 7, 64, 300)))]
            steps = draw.randint(1, 32)
            tokens = start(device, loop, lengths, steps=steps, first=first)
            events = rest(loop)
            assert brief(events) == expected(tokens, lengths, steps, first)
            times = [before, *(event.time_ns for event in events), time.monotonic_ns()]
            assert times == sorted(times)
            assert device.completed == device.launched
            before = times[-1]
            first += steps
        assert device.most_in_flight <= ahead


def test_steps_are_launched_ahead_of_the_tokens_that_were_seen(device: FakeDevice) -> None:
    loop = device.loop(ahead=3)
    tokens = start(device, loop, [99] * 4)
    got: list[TokenEvent] = []
    for seen in range(5):
        device.wait_for("launched", seen + 3)
        assert device.launched == seen + 3
        device.allow(1)
        events, ended = loop.wait(PATIENCE)
        assert not ended
        got += events
    assert brief(got) == expected(tokens, [99] * 4, 5)
    device.allow(99)
    rest(loop)
    assert device.most_in_flight == 3


def test_stop_drains_what_is_in_flight(device: FakeDevice) -> None:
    loop = device.loop()
    tokens = start(device, loop, [99] * 4)
    device.wait_for("launched", 2)
    joined(in_thread(loop.stop))
    assert loop.wait(PATIENCE) == ([], False)
    device.allow(99)
    assert brief(rest(loop)) == expected(tokens, [99] * 4, 2)
    assert device.launched == device.completed == loop.launched == 2
    assert loop.wait(PATIENCE) == ([], True)


def test_stop_without_a_run_does_not_stop_the_next(device: FakeDevice) -> None:
    loop = device.loop()
    device.allow(99)
    assert loop.wait(PATIENCE) == ([], True)
    loop.stop()
    tokens = start(device, loop, [3])
    assert brief(rest(loop)) == expected(tokens, [3], 3)


def test_a_run_ends_when_its_rows_have_finished(device: FakeDevice) -> None:
    """With the steps that were launched ahead done too, though they tell nothing."""
    loop = device.loop(ahead=3)
    tokens = start(device, loop, [2, 4])
    device.wait_for("launched", 3)
    device.allow(4)
    device.wait_for("launched", 6)
    got, ended = [], False
    while len(got) < 6:
        events, ended = loop.wait(PATIENCE)
        got += events
    assert brief(got) == expected(tokens, [2, 4], 4)
    assert not ended  # two steps are in flight
    device.allow(2)
    assert rest(loop) == []
    assert device.completed == device.launched == loop.launched == 6


def test_a_run_stops_when_few_rows_are_left(device: FakeDevice) -> None:
    loop = device.loop()
    lengths = [3, 99, 99, 1]
    tokens = start(device, loop, lengths, stop_at=2)
    device.allow(2)
    device.wait_for("launched", 4)
    device.allow(99)
    # The third step finishes the second row of them; the fourth was launched by then.
    assert brief(rest(loop)) == expected(tokens, lengths, 4)
    assert device.launched == 4


def test_the_first_step_is_run_in_any_case(device: FakeDevice) -> None:
    loop = device.loop()
    device.allow(99)
    tokens = start(device, loop, [99, 99], stop_at=2)
    assert brief(rest(loop)) == expected(tokens, [99, 99], 1)
    assert device.launched == 1


def test_a_refused_launch_ends_the_run_after_what_is_in_flight(device: FakeDevice) -> None:
    loop = device.loop()
    device.refuse_launch(after=5, error=ILLEGAL_ADDRESS)
    device.allow(99)
    tokens = start(device, loop, [99] * 4)
    assert brief(until_failure(loop, "an illegal memory access.*700")) == expected(
        tokens, [99] * 4, 5
    )
    assert device.completed == 5
    with pytest.raises(DeviceFailed):  # nobody can miss it
        loop.wait(PATIENCE)


def test_a_device_that_fails_in_a_step_is_noticed(device: FakeDevice) -> None:
    loop = device.loop()
    tokens = start(device, loop, [99] * 4)
    device.allow(3)
    device.wait_for("launched", 5)
    device.break_after(3, ILLEGAL_ADDRESS)  # with two steps in flight, and nothing to launch
    assert brief(until_failure(loop, "illegal memory access")) == expected(tokens, [99] * 4, 3)
    loop.run(4, 99, 1, 0)
    with pytest.raises(DeviceFailed):
        loop.wait(PATIENCE)


def test_a_device_that_fails_in_an_empty_step_is_noticed(device: FakeDevice) -> None:
    loop = device.loop()
    start(device, loop, [1])
    device.wait_for("launched", 2)
    device.break_after(1, ILLEGAL_ADDRESS)
    device.allow(1)
    assert len(until_failure(loop, "illegal memory access")) == 1


def test_a_slow_step_is_no_failure(device: FakeDevice) -> None:
    """The device is asked over and over, and is busy."""
    loop = device.loop()
    tokens = start(device, loop, [1])
    device.wait_for("queries", 5)
    assert loop.wait(0) == ([], False)
    device.allow(99)
    assert brief(rest(loop)) == expected(tokens, [1], 1)


def test_steps_that_are_done_when_the_device_is_asked(library: Path) -> None:
    """The first one among them, and those after it."""
    with FakeDevice(library, ring_steps=200) as device:
        device.complete_at_query()
        loop = device.loop(ahead=1)
        tokens = start(device, loop, [200], steps=200)
        assert brief(rest(loop)) == expected(tokens, [200], 200)


def test_a_token_that_never_comes_is_an_error(device: FakeDevice) -> None:
    loop = device.loop()
    device.drop(step=2, row=1)
    device.allow(99)
    tokens = start(device, loop, [99] * 4)
    assert brief(until_failure(loop, "never arrived")) == expected(tokens, [99] * 4, 2)


def test_steps_that_the_device_counts_otherwise_are_an_error(device: FakeDevice) -> None:
    """Entries of other steps, an older turn of the ring's among them, are never taken."""
    loop = device.loop()
    device.allow(99)
    start(device, loop, [16])
    rest(loop)
    device.fill(random_tokens(16, 1), [16], 0)
    loop.run(1, 16, 16, 0)
    with pytest.raises(DeviceFailed, match="never arrived"):
        rest(loop)


def test_wake_ends_a_wait_now_or_the_next(device: FakeDevice) -> None:
    loop = device.loop()
    start(device, loop, [99])
    loop.wake()
    assert loop.wait(None) == ([], False)
    got: list[object] = []
    waiter = in_thread(lambda: got.append(loop.wait(None)))
    loop.wake()
    joined(waiter)
    assert got == [([], False)]
    assert loop.wait(0.001) == ([], False)


def test_a_waiting_thread_is_told_of_a_token(device: FakeDevice) -> None:
    loop = device.loop()
    tokens = start(device, loop, [99])
    got: list[tuple[list[TokenEvent], bool]] = []
    waiter = in_thread(lambda: got.append(loop.wait(None)))
    device.allow(1)
    joined(waiter)
    assert [(brief(events), ended) for events, ended in got] == [(expected(tokens, [99], 1), False)]


def test_one_run_at_a_time(device: FakeDevice) -> None:
    loop = device.loop()
    start(device, loop, [2])
    with pytest.raises(ValueError, match="a run is on"):
        loop.run(1, 2, 2, 0)
    device.allow(99)
    device.wait_for("completed", 2)
    with pytest.raises(ValueError, match="a run is on"):  # nobody was told of its end
        loop.run(1, 2, 2, 0)
    rest(loop)
    tokens = start(device, loop, [2], first=2)
    assert brief(rest(loop)) == expected(tokens, [2], 2, 2)


def test_what_cannot_be_run_is_refused(device: FakeDevice) -> None:
    loop = device.loop()
    with pytest.raises(ValueError, match="prepared"):
        loop.run(1, 0, 1, 0)
    loop.prepare(4)
    with pytest.raises(ValueError, match="prepared"):
        loop.run(3, 0, 1, 0)
    for first, steps, stop_at in ((-1, 1, 0), (0, 0, 0), (0, 17, 0), (0, 1, -1)):
        with pytest.raises(ValueError, match="steps"):
            loop.run(4, first, steps, stop_at)
    loop.prepare(5)
    with pytest.raises(ValueError, match="rows"):
        loop.run(5, 0, 1, 0)
    assert device.launched == 0
    assert loop.wait(PATIENCE) == ([], True)
    for ring in (torch.zeros(4, 4, 3, dtype=torch.int32), torch.zeros(4, 4, 4)):
        with pytest.raises(ValueError, match="ring"):
            NativeLoop(torch.device("cuda", 0), 1, ring, lambda rows: GRAPH, library=device.library)


def test_a_device_that_is_not_there_is_an_error(device: FakeDevice) -> None:
    with pytest.raises(DeviceFailed, match="CUDA error 101"):
        device.loop(index=8)


def test_close_drains_and_ends_the_thread(device: FakeDevice) -> None:
    loop = device.loop()
    assert device.threads == 1
    start(device, loop, [99] * 4)
    device.wait_for("launched", 2)
    closer = in_thread(loop.close)
    assert loop.wait(PATIENCE) == ([], False)  # closing wakes
    assert closer.is_alive()
    device.allow(99)
    joined(closer)
    assert device.threads == 0
    assert device.completed == device.launched == 2
    assert len(rest(loop)) == 8
    loop.close()
    loop.stop()
    loop.wake()
    with pytest.raises(ValueError, match="closed"):
        loop.run(4, 2, 1, 0)


def test_a_loop_that_is_dropped_leaves_nothing(library: Path) -> None:
    with FakeDevice(library) as device:
        device.allow(99)
        loop = device.loop()
        start(device, loop, [99] * 4)
        device._loops.clear()
        del loop
        gc.collect()
        assert device.threads == 0
        assert device.completed == device.launched


def test_a_thread_that_holds_the_gil_holds_up_nothing(device: FakeDevice) -> None:
    """Nothing gives up the GIL here while a whole run of steps goes by."""
    loop = device.loop()
    tokens = start(device, loop, [16] * 4)
    device.allow(16)
    device.wait_for("completed", 16, holding_the_gil=True)
    assert brief(rest(loop)) == expected(tokens, [16] * 4, 16)


def test_the_launching_thread_is_its_own(device: FakeDevice) -> None:
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loop = device.loop(index=3)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mine
    device.allow(99)
    start(device, loop, [1])
    rest(loop)
    launcher = device.launcher
    assert launcher.name == b"llava-decode:3"
    assert launcher.device == 3
    assert launcher.capture_mode == 2  # relaxed
    assert launcher.timer_slack == 1000
    blocked = {n for n in range(1, 65) if launcher.blocked_signals >> (n - 1) & 1}
    assert blocked >= {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1}
    assert not blocked & {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
