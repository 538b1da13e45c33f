"""Decides, step by step, which sequences run and for how many tokens.

Continuous batching: sequences join and leave between steps. A step decodes every running sequence
and prefills at most `prefill_chunk` tokens besides, so a long prompt stalls nobody by more than one
chunk. Where blocks run out, the last in rank gives its blocks back and is computed again later.

A sequence whose sink has no room left is paused: it gives its place and its blocks back, so that a
reader who never comes holds up nobody, and waits again, in its old rank, once there is room. What
its full blocks hold stays in the cache until others need them; mostly little is computed anew.
Knows no tensor and no thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from llava_engine.errors import LlavaError, MemoryExhausted, PromptTooLong, RequestTimeout
from llava_engine.runtime.kv_cache import BlockPool, block_content, extend_digests
from llava_engine.runtime.sequence import Sequence, SequenceStatus
from llava_engine.types import FinishReason


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's part in a step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next can be sampled."""
        return self.num_tokens == self.sequence.uncomputed


class Scheduler:
    """First come, first served within a priority; lower priority values first.

    max_batch: sequences that hold blocks at once. prefill_chunk: tokens of prefill in one step.
    max_model_len: tokens after which a sequence ends with "length".
    """

    def __init__(
        self, pool: BlockPool, *, max_batch: int, prefill_chunk: int, max_model_len: int
    ) -> None:
        self._pool = pool
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._max_model_len = max_model_len
        self._arrivals = 0
        self.running: list[Sequence] = []
        self.num_waiting = 0
        self.paused: set[Sequence] = set()
        # Heaps with lazy deletion: a finished sequence is dropped when it comes up, or by `_sweep`.
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or fail it when it can never run."""
        unfinished = len(self.running) + self.num_waiting + len(self.paused)
        if len(self._waiting) + len(self._deadlines) > 4 * unfinished + 32:
            self._sweep()
        self._arrivals += 1
        sequence.arrival = self._arrivals
        needed = self._blocks_for(sequence.prompt_len + 1)
        if sequence.prompt_len >= self._max_model_len:
            sequence.status = SequenceStatus.FINISHED
            sequence.sink.fail(
                PromptTooLong(
                    f"The prompt has {sequence.prompt_len} tokens; the model's context of "
                    f"{self._max_model_len} leaves no room for an answer."
                )
            )
        elif needed > self._pool.num_blocks:
            sequence.status = SequenceStatus.FINISHED
            sequence.sink.fail(self._exhausted(needed))
        else:
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
            self._push(sequence)

    def schedule(self, now: float) -> list[Scheduled]:
        """The next step; empty when there is nothing to do."""
        self._expire(now)
        self.running.sort(key=lambda sequence: sequence.rank)
        step: list[Scheduled] = []
        budget = self._prefill_chunk
        waiting_before = self.num_waiting
        # In rank order, so that a victim of preemption is never one that this step already has.
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            if sequence.sink.cancelled:
                self.finish(sequence, FinishReason.CANCELLED)
                continue
            if sequence.sink.room <= 0:
                self._release(sequence)
                self._pause(sequence)
                continue
            decoding = sequence.uncomputed == 1
            num_tokens = 1 if decoding else min(sequence.uncomputed, budget)
            if num_tokens and self._grow(sequence, sequence.computed + num_tokens):
                budget -= 0 if decoding else num_tokens
                step.append(Scheduled(sequence, num_tokens))
        if self.num_waiting == waiting_before:
            while budget > 0 and (admitted := self._admit()) is not None:
                num_tokens = min(admitted.uncomputed, budget)
                budget -= num_tokens
                step.append(Scheduled(admitted, num_tokens))
        return step

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens of a sequence that the KV cache holds already."""
        pool, ids = self._pool, sequence.token_ids
        extend_digests(sequence.digests, ids, pool.block_size, sequence.cache_salt)
        cached = pool.acquire_prefix(sequence.digests, ids, len(ids) - 1)
        pool.free(cached)
        return len(cached) * pool.block_size

    def complete(self, scheduled: Scheduled, token_id: int | None) -> None:
        """A step is done: count its tokens, share full blocks, deliver the sampled token if any."""
        sequence = scheduled.sequence
        if sequence.status is not SequenceStatus.RUNNING:
            return
        sequence.computed += scheduled.num_tokens
        self._publish(sequence)
        if token_id is None:
            return
        sequence.features.clear()
        sequence.token_ids.append(token_id)
        sequence.sink.put(token_id)
        if token_id in sequence.eos_token_ids and not sequence.sampling.ignore_eos:
            self.finish(sequence, FinishReason.STOP)
        elif self.remaining(sequence) <= 0:
            self.finish(sequence, FinishReason.LENGTH)

    def remaining(self, sequence: Sequence) -> int:
        """Tokens that may still be sampled for it."""
        return min(
            sequence.max_new_tokens - sequence.completion_len, self._max_model_len - len(sequence)
        )

    def reserve(self, sequences: list[Sequence], max_steps: int) -> tuple[int, list[int]]:
        """Give decoding sequences blocks for as many steps as fit, and return how many: at least
        one, for which `schedule` has seen to, and no more than `max_steps` or than any can use.

        Also returns how many of them each sequence takes part in at most: it ends then, or its sink
        may be full. Nobody is preempted for it. `trim` takes back what the steps did not use.
        """
        limits = [
            min(max_steps, self.remaining(sequence), sequence.sink.room) for sequence in sequences
        ]

        def lacking(steps: int) -> list[int]:
            """Blocks that each lacks: the last token it samples needs no place yet."""
            return [
                max(
                    0,
                    self._blocks_for(len(sequence) + min(steps, limit) - 1)
                    - len(sequence.block_table),
                )
                for sequence, limit in zip(sequences, limits, strict=True)
            ]

        fits, beyond = 1, max(limits) + 1
        while beyond - fits > 1:
            steps = (fits + beyond) // 2
            if sum(lacking(steps)) <= self._pool.num_free:
                fits = steps
            else:
                beyond = steps
        for sequence, count in zip(sequences, lacking(fits), strict=True):
            sequence.block_table += self._pool.allocate(count)
        return fits, limits

    def trim(self) -> None:
        """Take back the blocks that lie behind the running sequences' tokens."""
        for sequence in self.running:
            needed = self._blocks_for(len(sequence))
            self._pool.free(sequence.block_table[needed:])
            del sequence.block_table[needed:]

    def next_deadline(self) -> float | None:
        """When `schedule` must be called at the latest, in time.monotonic() seconds."""
        while self._deadlines and self._deadlines[0][2].status is SequenceStatus.FINISHED:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and free its blocks."""
        self._drop(sequence)
        sequence.sink.finish(reason)

    def fail(self, sequence: Sequence, error: LlavaError) -> None:
        """End a sequence with an error and free its blocks."""
        self._drop(sequence)
        sequence.sink.fail(error)

    def reap(self) -> None:
        """Drop every waiting or paused sequence that nobody wants any more, and let the paused that
        have room again wait. O(both): call it on a signal, not in every step; running ones are
        looked at in `schedule`."""
        for sequence in (*self._queued(), *self.paused):
            if sequence.sink.cancelled:
                self.finish(sequence, FinishReason.CANCELLED)
        for sequence in [paused for paused in self.paused if paused.sink.room > 0]:
            self.paused.remove(sequence)
            self._push(sequence)
        self._sweep()

    def abandon(self) -> list[Sequence]:
        """Forget every sequence, in whatever state, and return them. Their blocks are not given
        back: after a failure of unknown extent the pool may be no better than the rest."""
        every = [*self.running, *self._queued(), *self.paused]
        for sequence in every:
            sequence.status = SequenceStatus.FINISHED
            sequence.features.clear()
        self.running, self._waiting, self._deadlines, self.num_waiting = [], [], [], 0
        self.paused = set()
        return every

    def make_room(self, num_blocks: int) -> None:
        """Preempt from the last in rank until the rest holds at most `num_blocks`."""
        while self._pool.num_blocks - self._pool.num_free > num_blocks:
            self._preempt(max(self.running, key=lambda sequence: sequence.rank))

    def _sweep(self) -> None:
        """Take what is finished out of the heaps: it comes up only after those of earlier deadlines
        or ranks, which may be paused for hours or never have their turn."""
        self._waiting = [(sequence.rank, sequence) for sequence in self._queued()]
        heapq.heapify(self._waiting)
        self._deadlines = [
            entry for entry in self._deadlines if entry[2].status is not SequenceStatus.FINISHED
        ]
        heapq.heapify(self._deadlines)

    def _queued(self) -> Iterator[Sequence]:
        return (
            sequence for _, sequence in self._waiting if sequence.status is SequenceStatus.WAITING
        )

    def _push(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self.num_waiting += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _pause(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.PAUSED
        self.paused.add(sequence)

    def _admit(self) -> Sequence | None:
        """Start the first in rank of those that wait, if there are blocks for all its tokens."""
        while self._waiting and len(self.running) < self._max_batch:
            sequence = self._waiting[0][1]
            if sequence.status is not SequenceStatus.WAITING:
                heapq.heappop(self._waiting)
                continue
            if sequence.sink.cancelled:
                self.finish(sequence, FinishReason.CANCELLED)
                continue
            if sequence.sink.room <= 0:  # preempted before it could be paused
                heapq.heappop(self._waiting)
                self.num_waiting -= 1
                self._pause(sequence)
                continue
            pool, ids = self._pool, sequence.token_ids
            extend_digests(sequence.digests, ids, pool.block_size, sequence.cache_salt)
            cached = pool.acquire_prefix(sequence.digests, ids, len(ids) - 1)
            needed = self._blocks_for(len(ids)) - len(cached)
            # Every running sequence keeps room for its next block, or it would soon be preempted.
            if needed + len(self.running) > pool.num_free:
                pool.free(cached)
                if self.running:
                    return None
                self.fail(sequence, self._exhausted(self._blocks_for(len(ids))))
                continue
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            sequence.block_table = cached + pool.allocate(needed)
            sequence.published = len(cached)
            sequence.computed = len(cached) * pool.block_size
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            if not sequence.started:
                sequence.started = True
                sequence.sink.start(sequence.computed)
            return sequence
        return None

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Make the sequence's blocks cover `length` tokens; False if it lost its place instead."""
        needed = self._blocks_for(length) - len(sequence.block_table)
        while needed > self._pool.num_free:
            if len(self.running) == 1:
                self.fail(sequence, self._exhausted(self._blocks_for(length)))
                return False
            victim = max(self.running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.block_table += self._pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._push(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.num_waiting -= 1
        self.paused.discard(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.features.clear()
        sequence.pictures = ()  # the heaps may have it for a while yet

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.block_table)
        self.running.remove(sequence)
        sequence.block_table = []
        sequence.computed = sequence.published = 0
        sequence.features.clear()

    def _publish(self, sequence: Sequence) -> None:
        pool, ids = self._pool, sequence.token_ids
        extend_digests(sequence.digests, ids, pool.block_size, sequence.cache_salt)
        full = sequence.computed // pool.block_size
        for index in range(sequence.published, full):
            content = block_content(ids, index, pool.block_size)
            pool.publish(sequence.block_table[index], sequence.digests[index], content)
        sequence.published = full

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence.status is not SequenceStatus.FINISHED:
                self.fail(sequence, RequestTimeout("The request's deadline passed."))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)

    def _exhausted(self, needed: int) -> MemoryExhausted:
        return MemoryExhausted(
            f"The request needs {needed} KV blocks of {self._pool.block_size} tokens; the cache "
            f"has {self._pool.num_blocks}."
        )
