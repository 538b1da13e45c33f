"""The two ends of a request: `Channel`, which the engine fills, and `ChunkStream`, which is read.

Filling never waits for the reader, and text is made only while reading: the reader's thread
detokenises, looks for stop strings and, at one, cancels what still runs. What a slow reader has not
taken yet is bounded, since the runtime fills no channel beyond its `room`.
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
from types import TracebackType
from typing import Protocol, Self

from llava_engine.errors import LlavaError, PoolError, RequestCancelled, RequestTimeout
from llava_engine.text.stop import StopFinder
from llava_engine.types import Chunk, FinishReason, Timings, Usage


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


class ChunkStream:
    """The answer to one request, as text chunks; iterate it with `for` or `async for`.

    One reader at a time; `cancel` and `close` may be called from any thread. Every failure of the
    request is raised from here, as a LlavaError. Leaving the stream (`with`, `close`, dropping the
    last reference) cancels what still runs and frees what it held.

    At most EngineConfig.max_unread_tokens wait here for a slow reader. Then the answer is paused,
    not ended, since to read late is no error, and nobody who asks for many answers and reads them
    one by one should lose any. A paused answer holds no KV block and no place in the batch, so
    others run as if it were not there, whoever is read first; it goes on as soon as it is read.
    One that is never read stays paused until its timeout, if it has any, or until it is closed; it
    counts among the PoolConfig.max_queue requests that may wait before new ones are refused.

    A forked child cannot read its parent's streams: what it has not read raises PoolError there.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stop = StopFinder(channel.stop)
        self._parts: list[Chunk] = []
        self._token_count = 0
        self._pending_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: LlavaError | None = None
        self._raised_at: TracebackType | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended; None until it was cancelled or its end was read."""
        if self._finish_reason is None and self._channel.reason is FinishReason.CANCELLED:
            return FinishReason.CANCELLED
        return self._finish_reason

    @property
    def usage(self) -> Usage:
        """Token counts, of the completion as far as it was read."""
        return self._channel.usage(self._token_count)

    @property
    def timings(self) -> Timings:
        """Seconds from the call to the end of each stage reached so far."""
        return self._channel.timings()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while True:
            chunk = self._advance()
            if chunk is not None:
                return chunk
            if self._finish_reason is not None:
                raise self._failure() or StopIteration
            self._channel.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            chunk = self._advance()
            if chunk is not None:
                return chunk
            if self._finish_reason is not None:
                raise self._failure() or StopAsyncIteration
            await self._channel.wait_async()

    def text(self) -> str:
        """The whole answer: what was read before, and the rest, waiting for it.

        Raises the request's LlavaError, or RequestCancelled when the stream was cancelled.
        """
        for _ in self:
            pass
        return self._whole_text()

    async def atext(self) -> str:
        """`text` for a coroutine."""
        async for _ in self:
            pass
        return self._whole_text()

    def cancel(self) -> None:
        """Stop generating. The stream ends without error and its finish_reason is "cancelled"."""
        self._channel.cancel()

    def close(self) -> None:
        """Give up the stream and free what it holds; cancels if it still runs."""
        self.cancel()

    async def aclose(self) -> None:
        """`close` for a coroutine; does not wait."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._channel.cancel()

    def __repr__(self) -> str:
        state = self._finish_reason or "running"
        return f"<ChunkStream {state}, {self._token_count} tokens read>"

    def _advance(self) -> Chunk | None:
        """The text that has become certain since the last call, or None if there is none yet."""
        if self._finish_reason is not None:
            return None
        tokens, reason, error = self._channel.take()
        if reason is FinishReason.CANCELLED:
            self._finish_reason = reason
            return None
        text = ""
        detokenizer = self._channel.detokenizer
        if detokenizer is not None:
            for token in tokens:
                self._token_count += 1
                self._pending_ids.append(token)
                text += self._stop.push(detokenizer.push(token))
                if self._stop.found:
                    break
            if reason is not None and not self._stop.found:
                text += self._stop.push(detokenizer.flush())
                if not self._stop.found:
                    text += self._stop.flush()
        if self._stop.found:
            self._finish_reason = FinishReason.STOP
            self._channel.cancel(FinishReason.STOP)
        elif reason is not None:
            self._finish_reason = reason
            self._error = error
            self._raised_at = error.__traceback__ if error is not None else None
        if not text:
            return None
        chunk = Chunk(text, self._pending_ids)
        self._pending_ids.clear()
        self._parts.append(chunk)
        return chunk

    def _failure(self) -> LlavaError | None:
        """The stream's error. Its traceback, to which each raise adds, is again what it was when it
        arrived here."""
        return None if self._error is None else self._error.with_traceback(self._raised_at)

    def _whole_text(self) -> str:
        if self._finish_reason is FinishReason.CANCELLED:
            raise RequestCancelled("The stream was cancelled before its end.")
        return "".join(self._parts)
