"""The reader's end of a request: `ChunkStream`, over the `Channel` that the engine fills.

Text is made only while reading: the reader's thread detokenises, looks for stop strings and, at
one, cancels what still runs.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from llava_engine.channel import Channel
from llava_engine.errors import LlavaError, RequestCancelled
from llava_engine.text.stop import StopFinder
from llava_engine.types import Chunk, FinishReason, Timings, Usage


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
