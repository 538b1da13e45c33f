"""The scheduler alone, with sinks that write down what they are told and no model."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from support.pictures import random_pictures
from support.scheduling import (
    EOS,
    advance,
    expected,
    next_token,
    scheduler,
    sequence,
    sink,
)

from llava_engine.errors import MemoryExhausted, PromptTooLong, RequestTimeout
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import Picture, Sequence, SequenceStatus
from llava_engine.types import FinishReason, SamplingParams


def test_a_sequence_is_prefilled_in_chunks_and_then_decodes() -> None:
    plan, pool = scheduler(prefill_chunk=5)
    one = sequence([1] * 12, 3)
    plan.add(one)
    sizes = []
    while step := advance(plan):
        sizes.append([entry.num_tokens for entry in step])
    assert sizes == [[5], [5], [2], [1], [1]]
    assert sink(one).tokens == expected([1] * 12, 3)
    assert sink(one).reason is FinishReason.LENGTH
    assert pool.num_free == pool.num_blocks


def test_a_long_prefill_delays_no_decode() -> None:
    plan, _ = scheduler(prefill_chunk=4)
    short, long = sequence([1, 2], 20), sequence([3] * 40, 2)
    plan.add(short)
    advance(plan)
    plan.add(long)
    for _ in range(10):
        before = len(sink(short).tokens)
        step = advance(plan)
        assert len(sink(short).tokens) == before + 1
        assert sum(e.num_tokens for e in step if e.sequence is long) <= 4


def test_first_come_first_served_within_a_priority() -> None:
    plan, _ = scheduler(max_batch=1)
    late, urgent, early = sequence([1], 1), sequence([2], 1, priority=-1), sequence([3], 1)
    for each in (early, late, urgent):
        plan.add(each)
    order = []
    while step := advance(plan):
        order += [entry.sequence for entry in step]
    assert order == [urgent, early, late]


def test_the_end_of_sequence_token_stops_unless_ignored() -> None:
    plan, _ = scheduler()
    stops, goes_on = sequence([1], 5), sequence([2], 2, ignore_eos=True)
    plan.add(stops)
    plan.add(goes_on)
    for _ in range(2):
        for entry in plan.schedule(0.0):
            plan.complete(entry, EOS)
    assert (sink(stops).tokens, sink(stops).reason) == ([EOS], FinishReason.STOP)
    assert (sink(goes_on).tokens, sink(goes_on).reason) == ([EOS, EOS], FinishReason.LENGTH)


def test_the_context_limit_ends_a_sequence() -> None:
    plan, _ = scheduler(max_model_len=10)
    one = sequence([1] * 8, 50)
    plan.add(one)
    while advance(plan):
        pass
    assert len(sink(one).tokens) == 2
    assert sink(one).reason is FinishReason.LENGTH


def test_what_can_never_run_fails_at_once() -> None:
    plan, pool = scheduler(blocks=2, max_model_len=20)
    too_long, too_big = sequence([1] * 20), sequence([1] * 8)
    plan.add(too_long)
    plan.add(too_big)
    assert isinstance(sink(too_long).error, PromptTooLong)
    assert isinstance(sink(too_big).error, MemoryExhausted)
    assert not plan.schedule(0.0)
    assert pool.num_free == pool.num_blocks


def test_preemption_loses_nothing_and_changes_no_token() -> None:
    plan, pool = scheduler(blocks=7)
    every = [sequence([i + 1] * 6, 14) for i in range(5)]
    for one in every:
        plan.add(one)
    preempted = 0
    for _ in range(500):
        running = set(map(id, plan.running))
        if not advance(plan):
            break
        preempted += sum(1 for s in every if id(s) in running and s.status.value == "waiting")
    assert preempted > 0, "the cache was meant to be too small"
    for index, one in enumerate(every):
        assert sink(one).tokens == expected([index + 1] * 6, 14)
        assert sink(one).reason is FinishReason.LENGTH
    assert pool.num_free == pool.num_blocks


def test_a_sequence_that_outgrows_the_whole_cache_fails_alone() -> None:
    plan, pool = scheduler(blocks=3)
    big, small = sequence([1] * 8, 40), sequence([2], 3)
    plan.add(big)
    plan.add(small)
    while advance(plan):
        pass
    assert isinstance(sink(big).error, MemoryExhausted)
    assert sink(small).tokens == expected([2], 3)
    assert pool.num_free == pool.num_blocks


def test_a_prefix_hit_leaves_the_last_partial_block_and_the_question() -> None:
    plan, _ = scheduler()
    picture = [-11, -12, -13, -14, -15, -16, -17, -18, -19]
    first, second = sequence([1, *picture, 2, 3], 1), sequence([1, *picture, 4], 1)
    plan.add(first)
    while advance(plan):
        pass
    plan.add(second)
    (entry,) = advance(plan)
    assert sink(second).cached == 8
    assert entry.num_tokens == len([1, *picture, 4]) - 8
    salted = sequence([1, *picture, 4], 1, cache_salt=b"other tenant")
    plan.add(salted)
    advance(plan)
    assert sink(salted).cached == 0


def test_an_identical_prompt_still_computes_its_last_token() -> None:
    plan, _ = scheduler()
    for _ in range(2):
        one = sequence([1] * 8, 1)
        plan.add(one)
        while advance(plan):
            pass
        assert sink(one).tokens == expected([1] * 8, 1)
    assert sink(one).cached == 4


def test_deadlines_fail_waiting_and_running_sequences() -> None:
    plan, pool = scheduler(max_batch=1)
    running, waiting = sequence([1], 50, deadline=5.0), sequence([2], 50, deadline=3.0)
    plan.add(running)
    plan.add(waiting)
    advance(plan, 1.0)
    advance(plan, 3.0)
    assert isinstance(sink(waiting).error, RequestTimeout)
    assert sink(running).error is None
    advance(plan, 5.0)
    assert isinstance(sink(running).error, RequestTimeout)
    assert pool.num_free == pool.num_blocks
    assert plan.num_waiting == 0 and not plan.running


@pytest.mark.parametrize("seed", range(5))
def test_random_aborts_leave_nothing_and_touch_nobody(seed: int) -> None:
    chance = random.Random(seed)
    plan, pool = scheduler(blocks=20, max_batch=4, prefill_chunk=7)
    every: list[tuple[Sequence, list[int]]] = []
    for _ in range(600):
        if chance.random() < 0.3 and len(every) < 80:
            prompt = [chance.randint(1, 3) for _ in range(chance.randint(1, 25))]
            every.append((sequence(prompt, chance.randint(1, 12)), prompt))
            plan.add(every[-1][0])
        if chance.random() < 0.1 and every:
            sink(chance.choice(every)[0]).cancelled = True
            if chance.random() < 0.5:
                plan.reap()
        advance(plan)
    while advance(plan):
        pass
    assert pool.num_free == pool.num_blocks
    assert plan.num_waiting == 0 and not plan.running and not plan.abandon()
    for one, prompt in every:
        assert one.status is SequenceStatus.FINISHED
        told = sink(one)
        want = expected(prompt, one.max_new_tokens)
        if told.reason is FinishReason.CANCELLED:
            assert told.cancelled and told.tokens == want[: len(told.tokens)]
        else:
            assert told.tokens == want


def test_make_room_preempts_the_last_in_rank_first() -> None:
    plan, pool = scheduler(blocks=20)
    early, late = sequence([1] * 8, 9), sequence([2] * 8, 9)
    plan.add(early)
    plan.add(late)
    advance(plan)
    plan.make_room(3)
    assert early.status is SequenceStatus.RUNNING and late.status is SequenceStatus.WAITING
    pool.resize(3)
    while advance(plan):
        pass
    assert isinstance(sink(early).error, MemoryExhausted) or sink(early).tokens
    assert pool.num_free == pool.num_blocks


def test_blocks_are_reserved_for_the_steps_that_fit_and_taken_back() -> None:
    plan, pool = scheduler(blocks=7)
    one, two = sequence([1] * 4, 30, ignore_eos=True), sequence([2] * 6, 4, ignore_eos=True)
    for each in (one, two):
        plan.add(each)
    advance(plan)
    assert (len(one), len(two), pool.num_free) == (5, 7, 7 - 1 - 2)
    assert len(plan.schedule(0.0)) == 2  # a block for the fifth token of the first
    assert pool.num_free == 3
    # The second needs one more block for its ninth token, and none after that: it ends with its
    # tenth. So the first can have two, and places for 16 tokens.
    assert plan.reserve([one, two], 100) == (12, [29, 3])
    assert (len(one.block_table), len(two.block_table), pool.num_free) == (4, 3, 0)
    plan.trim()
    assert (len(one.block_table), len(two.block_table), pool.num_free) == (2, 2, 3)


def test_no_more_is_reserved_than_asked_for_or_than_anyone_can_use() -> None:
    plan, pool = scheduler()
    one = sequence([1] * 4, 7, ignore_eos=True)
    plan.add(one)
    advance(plan)
    plan.schedule(0.0)
    assert plan.reserve([one], 2) == (2, [2])
    assert plan.reserve([one], 100) == (6, [6])  # the first of seven was sampled
    assert len(one.block_table) == 3  # tokens 0 to 9; the last one needs no place
    plan.trim()
    assert len(one.block_table) == 2  # tokens 0 to 4
    assert pool.num_free == pool.num_blocks - 2


@pytest.mark.parametrize("seed", range(30))
def test_runs_of_decoding_change_no_token_and_lose_no_block(seed: int) -> None:
    """Random runs between steps, broken off anywhere, in a pool that is too small."""
    chance = random.Random(seed)
    plan, pool = scheduler(blocks=chance.choice([9, 12, 40]), max_model_len=24)
    waiting = [
        sequence([chance.randrange(8, 50)] * chance.randint(1, 15), chance.randint(1, 15))
        for _ in range(12)
    ]
    every = list(waiting)
    for each in every:
        each.sampling = SamplingParams(ignore_eos=True)
    while waiting or plan.running or plan.num_waiting:
        if waiting and chance.random() < 0.3:
            plan.add(waiting.pop())
        step = plan.schedule(0.0)
        if not step or not all(entry.num_tokens == 1 and entry.completes for entry in step):
            for entry in step:
                completes = entry.completes
                plan.complete(entry, next_token(entry.sequence) if completes else None)
            continue
        sequences = [entry.sequence for entry in step]
        steps, most = plan.reserve(sequences, chance.choice([1, 3, 256]))
        assert 1 <= steps <= max(plan.remaining(each) for each in sequences)
        for _ in range(chance.randint(1, steps)):
            for each in sequences:
                if each.status is SequenceStatus.RUNNING:
                    assert each.computed // pool.block_size < len(each.block_table)
                    plan.complete(Scheduled(each, 1), next_token(each))
        plan.trim()
        for each in plan.running:
            needed, at_most = (-(-n // pool.block_size) for n in (each.computed, len(each)))
            assert needed <= len(each.block_table) <= at_most
        held = sum(len(each.block_table) for each in plan.running)
        assert pool.num_blocks - pool.num_free <= held  # equal beginnings share blocks
    assert pool.num_free == pool.num_blocks
    for each in every:
        count = min(each.max_new_tokens, 24 - each.prompt_len)
        assert sink(each).tokens == expected(each.token_ids[: each.prompt_len], count)
        assert sink(each).reason is FinishReason.LENGTH


def test_the_next_deadline_is_that_of_a_sequence_which_still_needs_it() -> None:
    plan, _ = scheduler()
    assert plan.next_deadline() is None
    first, second = sequence([1], 1, deadline=5.0), sequence([2], 9, deadline=7.0)
    for each in (second, first, sequence([3], 9)):
        plan.add(each)
    assert plan.next_deadline() == 5.0
    advance(plan)
    assert sink(first).reason is FinishReason.LENGTH
    assert plan.next_deadline() == 7.0
    plan.schedule(7.0)
    assert isinstance(sink(second).error, RequestTimeout)
    assert plan.next_deadline() is None


@pytest.mark.parametrize("blocked", ["deadline", "rank"])
def test_what_is_finished_is_kept_by_no_heap(blocked: str) -> None:
    """Neither behind a paused sequence of an earlier deadline, nor behind those of a better rank
    that always come first."""
    plan, pool = scheduler(max_batch=1)
    paused = sequence([1] * 6, 50, deadline=1e6)
    sink(paused).room = 1
    plan.add(paused)
    while advance(plan):
        pass
    ahead = sequence([2], 90, ignore_eos=True)
    if blocked == "rank":
        plan.add(ahead)
        advance(plan)
    features, picture = torch.zeros(1), Picture(b"", 0, 1, random_pictures(0, 1, 1)[0])
    held = weakref.ref(features), weakref.ref(picture.pixels.pixels)
    ended = []
    for number in range(500):
        each = sequence([3], 1, deadline=2e6 + number if blocked == "deadline" else float(number))
        each.pictures, each.features[b""] = (picture,), features
        ended.append(weakref.ref(each))
        plan.add(each)
        if blocked == "deadline":
            advance(plan)
        else:
            plan.schedule(number + 0.5)  # it is too late for it
        assert each.status is SequenceStatus.FINISHED
        del each
    del features, picture
    gc.collect()
    assert sum(kept() is not None for kept in ended) < 50
    assert [kept() for kept in held] == [None, None]
    assert paused.status is SequenceStatus.PAUSED and paused in plan.paused
    assert pool.num_blocks - pool.num_free == len(ahead.block_table)
