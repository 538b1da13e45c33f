"""Sequences whose readers are behind: in the scheduler alone, and in the runtime on the CPU,
against transformers."""

from __future__ import annotations

import random
import time

import pytest
from support.runtime import Sink, World, running, settled, until
from support.scheduling import advance, expected, next_token, scheduler, sequence, sink

from llava_engine import FinishReason
from llava_engine.errors import RequestTimeout, WorkerDied
from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import SequenceStatus


def test_a_sequence_without_room_gives_up_everything_until_there_is_room_again() -> None:
    plan, pool = scheduler(max_batch=2, prefill_chunk=32)
    slow, quick = sequence([1] * 10, 30, ignore_eos=True), sequence([2] * 10, 40, ignore_eos=True)
    sink(slow).room = 5
    for each in (slow, quick):
        plan.add(each)
    for count in range(1, 21):
        advance(plan)
        assert len(sink(quick).tokens) == count
        assert len(sink(slow).tokens) == min(count, 5)
    assert slow.status is SequenceStatus.PAUSED and plan.running == [quick]
    assert pool.num_blocks - pool.num_free == len(quick.block_table)
    third = sequence([3], 2, ignore_eos=True)
    plan.add(third)
    advance(plan)
    advance(plan)
    assert sink(third).reason is FinishReason.LENGTH  # it had the place in the batch
    plan.reap()
    assert slow.status is SequenceStatus.PAUSED
    sink(slow).room = 100
    plan.reap()
    (resumed,) = [entry for entry in plan.schedule(0.0) if entry.sequence is slow]
    assert resumed.completes and resumed.num_tokens <= pool.block_size  # the rest was kept
    plan.complete(resumed, next_token(slow))
    while advance(plan):
        pass
    assert sink(slow).tokens == expected([1] * 10, 30)
    assert sink(quick).tokens == expected([2] * 10, 40)
    assert pool.num_free == pool.num_blocks


def test_paused_sequences_end_by_cancelling_by_deadline_and_by_abandoning() -> None:
    plan, pool = scheduler()
    late, unwanted, left = (
        sequence([n] * 6, 20, deadline=d) for n, d in ((1, 5.0), (2, 9), (3, 9))
    )
    for each in (late, unwanted, left):
        sink(each).room = 2
        plan.add(each)
    while advance(plan):
        pass
    assert plan.paused == {late, unwanted, left} and pool.num_free == pool.num_blocks
    assert plan.next_deadline() == 5.0
    plan.schedule(5.0)
    assert isinstance(sink(late).error, RequestTimeout)
    sink(unwanted).cancelled = True
    plan.reap()
    assert sink(unwanted).reason is FinishReason.CANCELLED
    assert plan.abandon() == [left] and not plan.paused


@pytest.mark.parametrize("seed", range(30))
def test_readers_of_any_pace_change_no_token_and_lose_no_block(seed: int) -> None:
    """Every sink refuses a token beyond its room; rooms run out and come back at random, in steps,
    in runs and while a sequence that lost its blocks waits for others."""
    chance = random.Random(seed)
    plan, pool = scheduler(blocks=chance.choice([7, 12, 40]), max_batch=4, max_model_len=24)
    every = [
        sequence([chance.randrange(8, 50)] * chance.randint(1, 12), 12, ignore_eos=True)
        for _ in range(10)
    ]
    for each in every:
        sink(each).room = chance.randint(1, 6)
        plan.add(each)
    while plan.running or plan.num_waiting or plan.paused:
        step = plan.schedule(0.0)
        sequences = [entry.sequence for entry in step]
        if step and all(entry.num_tokens == 1 and entry.completes for entry in step):
            steps, most = plan.reserve(sequences, 256)
            for index in range(chance.randint(1, steps)):
                for each, limit in zip(sequences, most, strict=True):
                    if each.status is SequenceStatus.RUNNING and index < limit:
                        plan.complete(Scheduled(each, 1), next_token(each))
            plan.trim()
        else:
            for entry in step:
                completes = entry.completes
                plan.complete(entry, next_token(entry.sequence) if completes else None)
        if not step or chance.random() < 0.2:
            sink(chance.choice(every)).room = chance.randint(1, 6)
            plan.reap()
    assert pool.num_free == pool.num_blocks
    for each in every:
        count = min(12, 24 - each.prompt_len)
        assert sink(each).tokens == expected(each.token_ids[: each.prompt_len], count)


def paused(runtime: DeviceRuntime, count: int = 1) -> None:
    """Until so many are paused and nothing else is left; then no block is held."""
    until(lambda: len(runtime._scheduler.paused) == count == runtime.load())
    assert runtime.num_free_blocks == runtime.num_blocks


def test_a_reader_that_comes_late_gets_every_token(world: World, runtime: DeviceRuntime) -> None:
    slow, others = Sink(room=7), [Sink() for _ in range(3)]
    runtime.submit(world.sequence(0, [60], 40, slow))
    for index, reader in enumerate(others):
        runtime.submit(world.sequence(index, [70], 40, reader))
    for index, reader in enumerate(others):
        assert reader.wait() == world.expected(index, [70], 40)
    paused(runtime)
    assert len(slow.tokens) == 7
    while not slow.ended.is_set():
        slow.room += 11
        runtime.wake()
        until(lambda: slow.ended.is_set() or slow.room == 0)
    assert slow.tokens == world.expected(0, [60], 40)
    settled(runtime)


def test_nobody_waits_for_one_without_room(world: World) -> None:
    """One place in the batch: whoever is paused has left it to the next, and no step is spent on
    what cannot be delivered."""
    events: list[TokenEvent] = []
    for runtime in running(world, blocks=400, on_tokens=events.extend, max_batch=1):
        never = [Sink(room=3) for _ in range(5)]
        for reader in never:
            runtime.submit(world.sequence(None, [60], 30, reader))
        read = Sink()
        runtime.submit(world.sequence(None, [70], 30, read))
        assert read.wait() == world.expected(None, [70], 30)
        paused(runtime, 5)
        assert [len(reader.tokens) for reader in never] == [3] * 5
        # The first token of each is prefill's.
        assert len(events) == 5 * 2 + 29


def test_a_reader_who_keeps_up_waits_for_no_run_of_the_others(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is planned for the room that it had when the run began."""
    monkeypatch.setattr(Decoder, "_worth", lambda self, rows: 0)  # as with many rows on a GPU

    class Reader(Sink):
        def flush(self) -> None:
            super().flush()
            self.room = 4  # all is read at once
            behind.append(len(other.tokens) - len(self.tokens))

    behind: list[int] = []
    quick, other = Reader(room=4), Sink()
    runtime.submit(world.sequence(0, [60], 40, quick))
    runtime.submit(world.sequence(1, [70], 100, other))
    assert quick.wait() == world.expected(0, [60], 40)
    assert other.wait() == world.expected(1, [70], 100)
    assert max(behind) <= 4
    settled(runtime)


def test_a_paused_sequence_alone_ends_at_its_deadline(world: World, runtime: DeviceRuntime) -> None:
    reader = Sink(room=2)
    runtime.submit(world.sequence(0, [60], 40, reader, deadline=time.monotonic() + 0.5))
    paused(runtime)
    with pytest.raises(RequestTimeout):
        reader.wait()
    settled(runtime)


def test_a_paused_sequence_can_be_cancelled(world: World, runtime: DeviceRuntime) -> None:
    reader = Sink(room=2)
    runtime.submit(world.sequence(0, [60], 40, reader))
    paused(runtime)
    reader.cancelled = True
    runtime.wake()
    reader.wait()
    assert reader.reason is FinishReason.CANCELLED and len(reader.tokens) == 2
    settled(runtime)


def test_closing_ends_what_is_paused(world: World) -> None:
    for runtime in running(world, blocks=100):
        reader = Sink(room=2)
        runtime.submit(world.sequence(0, [60], 40, reader))
        paused(runtime)
        runtime.close()
        with pytest.raises(WorkerDied):
            reader.wait()
