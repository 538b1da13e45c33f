"""The engine's end of a request: `Channel`, which it fills, and which a ChunkStream reads.

Filling never waits for the reader. What a slow reader has not taken yet is bounded, since the
runtime fills no channel beyond its `room`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from llava_engine.errors import LlavaError, PoolError, RequestTimeout
from llava_engine.types import FinishReason, Timings, Usage


def other_process(what: str) -> PoolError:
    """What is raised for a pool or a stream of the process that this one was forked from."""
    error = PoolError(
        f"This {what} belongs to the process that this one was forked from: its threads are not "
        "here. Use llava_engine in one of the two only, or start processes with the spawn method."
    )
    error.retryable = False
    return error


class Detokenizer(Protocol):
    """Token ids to text, bit by bit (text.detokenizer has the one implementation)."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """What was held back."""


class Channel:
    """The engine's end of a request. Implements runtime.sequence.TokenSink; all methods are
    thread-safe, return at once, and have no effect after the end."""

    def __init__(
        self,
        stop: tuple[str, ...] = (),
        deadline: float | None = None,
        on_end: Callable[[Channel], None] | None = None,
    ) -> None:
        """`on_end` is called once, from whichever thread ends the stream; it may run inside a
        garbage collection, so it must take no lock."""
        self.stop = stop
        self.deadline = deadline
        self.started = False
        self.produced = 0
        self._on_end = on_end
        self._pid = os.getpid()
        self._born = time.monotonic()
        # The default RLock lets a garbage-collected stream cancel from within any of these calls.
        self._changed = threading.Condition()
        self._tokens: deque[int] = deque()
        self._waiters: list[Callable[[], None]] = []
        self._on_change: Callable[[], None] | None = None
        self._detokenizer: Detokenizer | None = None
        self._max_unread = sys.maxsize
        self._reason: FinishReason | None = None
        self._error: LlavaError | None = None
        self._prompt_tokens = self._image_tokens = self._cached_tokens = 0
        self._times: dict[str, float] = {}

    @property
    def cancelled(self) -> bool:
        """True once nobody wants further tokens, or the request has ended."""
        return self._reason is not None

    @property
    def room(self) -> int:
        """See TokenSink. Takes no lock: a reader can only make it more meanwhile."""
        return self._max_unread - len(self._tokens)

    @property
    def reason(self) -> FinishReason | None:
        """How the engine's end was closed; None while it is open."""
        return self._reason

    @property
    def error(self) -> LlavaError | None:
        """What the stream failed with."""
        return self._error

    def bind(
        self,
        detokenizer: Detokenizer,
        prompt_tokens: int,
        image_tokens: int,
        max_unread: int = sys.maxsize,
    ) -> None:
        """The prompt is built: how to make text of the answer, what the prompt counts, and how many
        tokens may wait for the reader."""
        with self._changed:
            self._max_unread = max_unread
            self._detokenizer = detokenizer
            self._prompt_tokens = prompt_tokens
            self._image_tokens = image_tokens

    def stamp(self, stage: str) -> None:
        """Note that `stage` ("queued", "image") is over; see types.Timings."""
        self._times.setdefault(stage, time.monotonic() - self._born)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the stream is ended by somebody else than the one who works on it
        (the reader, the deadline, the pool), at once if it already has ended; and when a reader who
        was far behind has caught up. It must take no lock, since a garbage collection may run it.
        """
        with self._changed:
            over = self._reason is not None
            if not over:
                self._on_change = callback
        if over:
            callback()

    def start(self, cached_tokens: int) -> None:
        """See TokenSink."""
        with self._changed:
            self._cached_tokens = cached_tokens
            self.started = True

    def put(self, token_id: int) -> None:
        """See TokenSink."""
        with self._changed:
            if self._reason is None:
                self.stamp("first_token")
                self.produced += 1
                self._tokens.append(token_id)

    def flush(self) -> None:
        """See TokenSink."""
        with self._changed:
            self._wake()

    def finish(self, reason: FinishReason) -> None:
        """See TokenSink."""
        self._end(reason, None)

    def fail(self, error: LlavaError) -> None:
        """See TokenSink."""
        self._end(FinishReason.ERROR, error)

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """The reader wants no more: end the stream here and tell whoever works on it."""
        self._end(reason, None, abort=True)

    def abort(self, error: LlavaError) -> None:
        """End the stream with an error from outside, and tell whoever works on it."""
        self._end(FinishReason.ERROR, error, abort=True)

    def expire(self) -> None:
        """Abort with RequestTimeout: the deadline has passed."""
        self.abort(RequestTimeout("The request's deadline passed."))

    def overdue(self) -> bool:
        """Whether the deadline has passed; then the stream has ended with RequestTimeout."""
        if self.deadline is None or time.monotonic() < self.deadline:
            return False
        self.expire()
        return True

    def _end(self, reason: FinishReason, error: LlavaError | None, abort: bool = False) -> None:
        if os.getpid() != self._pid:
            return  # no thread of a forked child works on it, and the lock may be held for ever
        with self._changed:
            if self._reason is not None:
                return
            self._reason = reason
            self._error = error
            self.stamp("total")
            callback, self._on_change = self._on_change, None
            self._wake()
        if abort and callback is not None:
            callback()
        if self._on_end is not None:
            self._on_end(self)

    def _wake(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise other_process("stream")

    def take(self) -> tuple[list[int], FinishReason | None, LlavaError | None]:
        """The tokens that arrived since the last call, and how the stream ended if it has.

        Raises PoolError in a forked child, as do `wait` and `wait_async`.
        """
        self._check_process()
        self.overdue()
        with self._changed:
            tokens = list(self._tokens)
            self._tokens.clear()
            reason, error, callback = self._reason, self._error, self._on_change
        # From half on: the runtime may have planned for less room than there is now.
        if callback is not None and 2 * len(tokens) > self._max_unread:
            callback()
        return tokens, reason, error

    def _news(self) -> bool:
        return bool(self._tokens) or self._reason is not None

    def _patience(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def wait(self) -> None:
        """Block until there is something to take, or the deadline has passed."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(self._news, self._patience())

    async def wait_async(self) -> None:
        """`wait` for a coroutine: the event loop runs on."""
        self._check_process()
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def wake() -> None:
            # A loop that is closed has no reader left to wake. It may be closed at any moment, so
            # it is not asked before.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.set)

        with self._changed:
            if self._news():
                return
            self._waiters.append(wake)
        try:
            await asyncio.wait_for(arrived.wait(), self._patience())
        except TimeoutError:
            pass
        finally:
            with self._changed:
                if wake in self._waiters:
                    self._waiters.remove(wake)

    @property
    def detokenizer(self) -> Detokenizer | None:
        """Bound before the first token arrives; None until then."""
        return self._detokenizer

    def usage(self, completion_tokens: int) -> Usage:
        """The counts, given how many tokens the reader has seen."""
        return Usage(
            self._prompt_tokens, self._image_tokens, self._cached_tokens, completion_tokens
        )

    def timings(self) -> Timings:
        """The stages reached so far."""
        return Timings(**self._times)
