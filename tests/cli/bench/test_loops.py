"""Closed and open loops over streams that a test fills by hand."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from llava_engine import FinishReason
from llava_engine.channel import Channel
from llava_engine.cli.bench.loops import closed_loop, open_loop
from llava_engine.cli.describe import BadInput
from llava_engine.errors import WorkerDied
from llava_engine.stream import ChunkStream


class Letters:
    def push(self, token_id: int) -> str:
        return chr(97 + token_id)

    def flush(self) -> str:
        return ""


class Engine:
    """Answers each request from a thread, and counts how many run at once."""

    def __init__(self, seconds: float = 0.02, tokens: int = 3) -> None:
        self.seconds, self.tokens = seconds, tokens
        self.asked: list[tuple[int, float]] = []
        self.running = self.most = 0
        self.lock = threading.Lock()

    def ask(self, number: int) -> ChunkStream:
        channel = Channel()
        channel.bind(Letters(), 10, 4)
        with self.lock:
            self.asked.append((number, time.perf_counter()))
            self.running += 1
            self.most = max(self.most, self.running)
        threading.Thread(target=self.answer, args=(number, channel)).start()
        return ChunkStream(channel)

    def answer(self, number: int, channel: Channel) -> None:
        channel.stamp("queued")
        channel.stamp("image")
        for token in range(self.tokens):
            time.sleep(self.seconds)
            channel.put(token)
            channel.flush()
        with self.lock:
            self.running -= 1
        if number == 5:
            channel.fail(WorkerDied("it died"))
        else:
            channel.finish(FinishReason.LENGTH)


def test_a_closed_loop_keeps_so_many_going():
    engine = Engine()
    records, seconds = closed_loop(engine.ask, 12, 3)
    assert engine.most == 3
    assert [record.number for record in records] == list(range(12))
    assert sorted(number for number, _ in engine.asked) == list(range(12))
    assert seconds >= 12 / 3 * 3 * 0.02  # four rounds of three tokens each


def test_one_at_a_time_is_one_after_the_other():
    engine = Engine()
    records, _ = closed_loop(engine.ask, 4, 1)
    assert engine.most == 1
    for before, after in itertools.pairwise(records):
        assert before.ended <= after.submitted


def test_a_record_holds_what_was_seen():
    (record,), seconds = closed_loop(Engine(seconds=0.05).ask, 1, 1)
    assert record.token_ids == [0, 1, 2] and record.output_tokens == 3
    assert (record.prompt_tokens, record.image_tokens) == (10, 4)
    assert record.submitted < record.arrivals[0] < record.arrivals[-1] <= record.ended
    assert record.first_token_s >= 0.05 and record.latency_s >= 0.15
    assert seconds >= record.latency_s
    assert set(record.stages) == {"queued", "image", "first_token", "total"}
    assert record.error is None


def test_a_failure_is_the_requests_own():
    records, _ = closed_loop(Engine().ask, 8, 2)
    assert [record.error for record in records] == [
        None if number != 5 else "WorkerDied: it died" for number in range(8)
    ]


@pytest.mark.parametrize("loop", [lambda ask: closed_loop(ask, 3, 2),
                                  lambda ask: open_loop(ask, 3, 1000, 0)])  # fmt: skip
def test_a_wrong_argument_ends_the_run(loop):
    def ask(number: int) -> ChunkStream:
        raise BadInput("no such thing")

    with pytest.raises(BadInput, match="no such thing"):
        loop(ask)


def test_an_open_loop_waits_for_nobody():
    """The first request runs until the last has been asked."""
    started, over = [], threading.Event()

    def ask(number: int) -> ChunkStream:
        channel = Channel()
        channel.bind(Letters(), 1, 0)
        started.append(number)
        if len(started) == 20:
            over.set()

        def answer() -> None:
            assert over.wait(30)
            channel.put(0)
            channel.finish(FinishReason.LENGTH)

        threading.Thread(target=answer).start()
        return ChunkStream(channel)

    records, _ = open_loop(ask, 20, 400.0, seed=1)
    assert len(records) == 20 and not any(record.error for record in records)


def test_arrivals_are_a_poisson_process_of_the_seed(monkeypatch):
    """Gaps on a clock that only sleeping moves: exponential, so their mean and their deviation are
    both 1 / rate, and the same for the same seed."""

    class Clock:
        now = 0.0

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    def due_times(seed: int, count: int) -> list[float]:
        clock, found = Clock(), []
        monkeypatch.setattr("llava_engine.cli.bench.loops.clock", lambda: clock.now)
        monkeypatch.setattr("llava_engine.cli.bench.loops.time.sleep", clock.sleep)
        engine = Channel()
        engine.bind(Letters(), 1, 0)
        engine.finish(FinishReason.LENGTH)

        def ask(number: int) -> ChunkStream:
            return ChunkStream(engine)

        def submit(pool, job, ask, number):
            found.append(clock.now)
            return original(pool, job, ask, number)

        from concurrent.futures import ThreadPoolExecutor

        original = ThreadPoolExecutor.submit
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
        try:
            open_loop(ask, count, 8.0, seed)
        finally:
            monkeypatch.undo()
        return found

    times = due_times(7, 400)
    assert times[:50] == due_times(7, 50) != due_times(8, 50)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    # Four standard errors of 400 draws: of the mean 0.05, of the deviation about 0.07 of 1 / rate.
    assert abs(8 * mean - 1) < 0.2 and abs(8 * deviation - 1) < 0.3
    assert min(gaps) > 0
