"""Runs what the scheduler plans: steps of anything, or many of decoding alone."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

import torch

from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.decode_state import RING_STEPS
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.failures import LOST, MemoryErrors, of_request, raise_if_lost
from llava_engine.runtime.inbox import Inbox
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.picture_encoder import MOST_AT_ONCE
from llava_engine.runtime.ranges import Ranges
from llava_engine.runtime.scheduler import Scheduled, Scheduler
from llava_engine.runtime.sequence import SequenceStatus, TokenSink

logger = logging.getLogger(__name__)


class Steps:
    """The loop thread's work between two looks at its inbox.

    inbox: a run of decoding steps ends early when there is news in it.
    on_tokens: as in DeviceRuntime. opened: names what runs, for profilers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        decoder: Decoder,
        inbox: Inbox,
        device: torch.device,
        *,
        on_tokens: Callable[[list[TokenEvent]], None] | None,
        opened: Ranges,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._decoder = decoder
        self._inbox = inbox
        self._device = device
        self._on_tokens = on_tokens
        self._range = opened
        self._asynchronous = device.type == "cuda"
        self._memory_errors = MemoryErrors(device)
        self._unflushed: list[TokenSink] = []

    def close(self) -> None:
        """Free what was captured, once the steps in flight are done."""
        try:
            self._decoder.close()  # first: steps in flight still write to the cache
            self._runner.close()
        finally:
            del self._runner

    def run(self, step: list[Scheduled]) -> None:
        """Run a step, or as many as decode the same sequences, and hand their tokens out.

        Raises what says that the device is lost (LOST); other failures end those they belong to.
        """
        if step and not all(self._decodes(entry) for entry in step):
            with self._range("llava_engine: step"):
                self._prefill(step)
            return
        self._flush()
        if step:
            with self._range("llava_engine: decode"):
                self._decode(step)

    def _flush(self) -> None:
        """Wake the readers of the last step's tokens.

        They take Python's lock for a while, each, so this is done when the device has its next
        work, if there is more than decoding, which does without Python. The CPU's own work is
        done when it is launched: there they are woken before it.
        """
        for sink in self._unflushed:
            sink.flush()
        self._unflushed.clear()

    def _prefill(self, step: list[Scheduled]) -> None:
        """One step of anything, pictures and long prompts included."""
        if not self._asynchronous:
            self._flush()
        try:
            tokens = self._runner.run(step, launched=self._flush)
        except LOST:
            raise
        except Exception as error:
            raise_if_lost(self._device)
            out_of_memory = self._memory_errors.happened()
            self._flush()
            # Its frames hold the step's tensors: memory that the next try may need, and that would
            # be kept as long as a reader keeps the exception.
            traceback.clear_frames(error.__traceback__)
            failure = error
        else:
            for entry, token in zip(step, tokens, strict=True):
                self._scheduler.complete(entry, token)
                if token is not None:
                    self._unflushed.append(entry.sequence.sink)
            return
        if len(step) == 1:
            failed = of_request(failure, out_of_memory=out_of_memory)
            self._scheduler.fail(step[0].sequence, failed)
            return
        # One sequence's failure is its own: find it by running each alone.
        logger.warning("A step of %d sequences failed; running each alone.", len(step))
        for entry in step:
            self._prefill([entry])

    def _decodes(self, entry: Scheduled) -> bool:
        """Whether the entry is a decoding step's."""
        return entry.num_tokens == 1 and entry.completes and self._decoder.takes(entry.sequence)

    def _decode(self, step: list[Scheduled]) -> None:
        """Many steps of decoding alone, until somebody wants something or too few are left."""
        sequences = [entry.sequence for entry in step]
        steps, most = self._scheduler.reserve(sequences, RING_STEPS)
        try:
            self._decoder.start(
                sequences, most, steps, until_one_ends=self._scheduler.num_waiting > 0
            )
        except LOST:
            raise
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = self._deliver()
        self._scheduler.trim()
        if failure is None:
            return
        raise_if_lost(self._device)
        self._memory_errors.happened()  # those who are run alone are asked for themselves
        traceback.clear_frames(failure.__traceback__)  # as in _prefill
        logger.warning("Decoding failed; running each sequence alone.", exc_info=failure)
        # What was delivered is right; the rest finds out alone whose failure it was.
        for sequence in sequences:
            if sequence.status is SequenceStatus.RUNNING and sequence.sink.room > 0:
                self._prefill([Scheduled(sequence, 1)])

    def _deliver(self) -> Exception | None:
        """Hand out tokens until the run has ended, and end it early when there is other work.

        Returns what a step failed with. Nothing put into the inbox is overlooked: who puts
        something there calls `stop` afterwards. Either the item was there when we look, before each
        wait, and we stop the run ourselves. Or it came later, and so did the `stop`, which finds
        the run on and ends it, or at the least makes this wait return, after which we look again.
        """
        changed, stopped, ended = False, False, False
        while not ended:
            deadline = self._scheduler.next_deadline()
            left = None if deadline is None else deadline - time.monotonic()
            overdue = left is not None and left <= 0
            if not stopped and (changed or overdue or self._inbox.has_news()):
                self._decoder.stop()  # once: each makes a wait return at once
                stopped = True
                self._encode_ahead()
            if stopped:
                left = None  # only what is in flight is still to come
            try:
                tokens, ended = self._decoder.wait(left)
            except LOST:
                raise
            except Exception as error:
                return error
            if self._on_tokens is not None and tokens:
                self._on_tokens([event for _, event in tokens])
            for sequence, event in tokens:
                self._scheduler.complete(Scheduled(sequence, 1), event.token)
                sequence.sink.flush()
                if sequence.status is SequenceStatus.RUNNING:
                    # Its row is idle from now on, but its reader has kept up: no news will tell.
                    idles = event.finished and sequence.sink.room > 0
                    changed = changed or idles or sequence.sink.cancelled
        return None

    def _encode_ahead(self) -> None:
        """Encode the pictures of those who have just come beside the decoding steps in flight.

        A failure is of no consequence: their own step finds it again, and whose it is.
        """
        sequences = self._inbox.sequences()
        if self._scheduler.num_waiting > 0:
            return  # it is not their turn, and features take memory
        pictures = [
            (sequence, picture)
            for sequence in sequences
            if not sequence.sink.cancelled
            for picture in sequence.pictures
            if self._scheduler.num_cached(sequence) < picture.offset + picture.length
        ]
        try:
            self._runner.encode_pictures(pictures[:MOST_AT_ONCE])
        except LOST:
            raise
        except Exception as error:
            raise_if_lost(self._device)
            self._memory_errors.happened()
            traceback.clear_frames(error.__traceback__)
