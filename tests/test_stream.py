"""Both ends of a stream, with a detokenizer of one letter per token and no model."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_engine import (
    ChunkStream,
    FinishReason,
    ImageDecodeError,
    RequestCancelled,
    RequestTimeout,
    Usage,
)
from llava_engine.channel import Channel


class Letters:
    """Token n is the n-th letter; "é" needs two tokens, 1000 and 1001."""

    def __init__(self) -> None:
        self.half = False

    def push(self, token_id: int) -> str:
        if token_id == 1000:
            self.half = True
            return ""
        if token_id == 1001:
            self.half = False
            return "é"
        return chr(token_id)

    def flush(self) -> str:
        return "\ufffd" if self.half else ""


def channel(stop: tuple[str, ...] = (), deadline: float | None = None) -> Channel:
    made = Channel(stop, deadline)
    made.bind(Letters(), prompt_tokens=9, image_tokens=4)
    return made


def fill(channel: Channel, text: str, reason: FinishReason | None = FinishReason.STOP) -> None:
    for letter in text:
        channel.put(ord(letter))
    if reason is not None:
        channel.finish(reason)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_for_a_reader(channel: Channel) -> None:
    """Until somebody blocks in `wait`, so that what follows has a sleeper to wake."""
    while not channel._changed._waiters:
        time.sleep(0.001)


def test_chunks_arrive_as_they_are_put() -> None:
    end = channel()
    stream = ChunkStream(end)
    fill(end, "ab", None)
    assert next(stream) == "ab"
    reader = in_thread(lambda: (wait_for_a_reader(end), fill(end, "c")))
    assert list(stream) == ["c"]
    reader.join()
    assert stream.finish_reason is FinishReason.STOP
    assert stream.text() == "abc"
    assert stream.usage == Usage(9, 4, 0, 3)


def test_async_iteration_leaves_the_loop_running() -> None:
    async def main() -> tuple[list[str], int]:
        end = channel()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while ticks < 5:
                ticks += 1
                await asyncio.sleep(0)
            await asyncio.to_thread(fill, end, "done")

        ticker = asyncio.create_task(tick())
        stream = ChunkStream(end)
        pieces = [chunk async for chunk in stream]
        await ticker
        assert await stream.atext() == "done"
        return pieces, ticks

    pieces, ticks = asyncio.run(main())
    assert "".join(pieces) == "done" and ticks == 5


def test_an_abandoned_async_wait_leaves_no_waiter() -> None:
    async def main() -> None:
        end = channel()
        stream = ChunkStream(end)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.01)
        assert not end._waiters
        fill(end, "late")
        assert await stream.atext() == "late"

    asyncio.run(main())


def test_a_producer_outliving_the_event_loop_is_harmed_by_nothing() -> None:
    end = channel()
    stream = ChunkStream(end)

    async def main() -> None:
        waiting = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(main())
    fill(end, "still fine")
    assert stream.text() == "still fine"


def test_a_loop_that_is_closed_in_the_moment_of_waking_is_no_producers_failure() -> None:
    class Closing(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *arguments, **options):
            self.close()  # as another thread may, whatever was asked before
            return super().call_soon_threadsafe(*arguments, **options)

    end = channel()
    stream, loop = ChunkStream(end), Closing()
    waiting = loop.create_task(stream.__anext__())
    waiting._log_destroy_pending = False
    loop.run_until_complete(asyncio.sleep(0))
    fill(end, "still fine")
    assert loop.is_closed() and not waiting.done()
    assert stream.text() == "still fine"


def test_errors_come_after_the_tokens_before_them_and_again_when_asked_again() -> None:
    end = channel()
    stream = ChunkStream(end)
    fill(end, "ab", None)
    end.fail(ImageDecodeError("broken"))
    assert next(stream) == "ab"
    for _ in range(2):
        with pytest.raises(ImageDecodeError, match="broken"):
            next(stream)
    with pytest.raises(ImageDecodeError):
        stream.text()
    assert stream.finish_reason is FinishReason.ERROR


def test_a_stored_errors_traceback_does_not_grow() -> None:
    end = channel()
    stream = ChunkStream(end)
    try:
        raise ImageDecodeError("broken") from ValueError("why")
    except ImageDecodeError as error:
        end.fail(error)
    lengths = []
    for _ in range(3):
        with pytest.raises(ImageDecodeError) as raised:
            stream.text()
        lengths.append(len(traceback.extract_tb(raised.value.__traceback__)))
        assert isinstance(raised.value.__cause__, ValueError)
        with pytest.raises(ImageDecodeError):
            asyncio.run(stream.atext())
    assert len(set(lengths)) == 1
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert any("from ValueError" in (frame.line or "") for frame in frames)  # where it began


def test_a_forked_child_is_told_and_neither_hangs_nor_ends_its_parents_stream() -> None:
    """The child's copy of the lock is held by a thread that it does not have."""
    code = """
        import asyncio, os, signal, threading
        from llava_engine.errors import PoolError
        from llava_engine.channel import Channel
        from llava_engine.stream import ChunkStream
        end = Channel(on_end=lambda _: print("ended"))
        stream = ChunkStream(end)
        held, forked = threading.Event(), threading.Event()

        def hold():
            with end._changed:
                held.set()
                forked.wait()

        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            for use in (
                lambda: next(stream),
                stream.text,
                lambda: asyncio.run(stream.atext()),
                end.wait,
                lambda: asyncio.run(end.wait_async()),
            ):
                try:
                    use()
                except PoolError as error:
                    print("This stream" in str(error), error.retryable, flush=True)
            stream.close()
            del stream
            os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end.reason, flush=True)
        forked.set()
        stream.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["True False"] * 5 + ["3 None", "ended"], done.stderr


def test_only_the_first_end_counts() -> None:
    end = channel()
    fill(end, "ab")
    end.fail(ImageDecodeError("late"))
    fill(end, "more")
    assert ChunkStream(end).text() == "ab"


def test_cancel_wakes_the_reader_and_tells_the_engine_once() -> None:
    end = channel()
    told: list[int] = []
    end.on_change(lambda: told.append(1))
    stream = ChunkStream(end)
    canceller = in_thread(lambda: (wait_for_a_reader(end), stream.cancel()))
    assert list(stream) == []
    canceller.join()
    stream.close()
    assert told == [1] and end.cancelled
    assert stream.finish_reason is FinishReason.CANCELLED
    with pytest.raises(RequestCancelled):
        stream.text()


def test_a_callback_set_after_the_cancel_is_called_at_once() -> None:
    end = channel()
    end.cancel()
    told: list[int] = []
    end.on_change(lambda: told.append(1))
    assert told == [1]


def test_leaving_a_stream_frees_it() -> None:
    for leave in ("with", "async with", "drop"):
        end = channel()
        told: list[str] = []
        end.on_change(lambda told=told: told.append("cancelled"))
        stream = ChunkStream(end)
        if leave == "with":
            with stream:
                pass
        elif leave == "async with":

            async def use(stream: ChunkStream = stream) -> None:
                async with stream:
                    pass

            asyncio.run(use())
            use.__defaults__ = None
        del stream
        gc.collect()
        assert told == ["cancelled"], leave


def test_a_finished_stream_is_not_cancelled_by_leaving_it() -> None:
    end = channel()
    told: list[int] = []
    end.on_change(lambda: told.append(1))
    with ChunkStream(end) as stream:
        fill(end, "x")
        assert stream.text() == "x"
    assert not told and stream.finish_reason is FinishReason.STOP


def test_the_deadline_ends_a_stream_that_nobody_fills() -> None:
    end = channel(deadline=time.monotonic() + 0.05)
    told: list[int] = []
    end.on_change(lambda: told.append(1))
    with pytest.raises(RequestTimeout):
        ChunkStream(end).text()
    assert told == [1]
    late = channel(deadline=time.monotonic() + 0.05)
    with pytest.raises(RequestTimeout):
        asyncio.run(ChunkStream(late).atext())


def test_half_a_character_waits_for_its_other_half() -> None:
    end = channel()
    stream = ChunkStream(end)
    end.put(1000)
    fill(end, "", None)
    adder = in_thread(lambda: (wait_for_a_reader(end), end.put(1001), end.flush()))
    chunk = next(stream)
    adder.join()
    assert chunk == "é" and chunk.token_ids == (1000, 1001)
    end.put(1000)
    end.finish(FinishReason.LENGTH)
    assert list(stream) == ["\ufffd"]


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.sets(st.integers(0, 30)),
)
def test_stop_strings_are_found_across_tokens(text: str, stop: list[str], cuts: set[int]) -> None:
    end = channel(tuple(stop))
    stream = ChunkStream(end)
    got = ""
    for place, letter in enumerate(text):
        end.put(ord(letter))
        if place in cuts and (chunk := stream._advance()) is not None:
            got += chunk
    end.finish(FinishReason.LENGTH)
    got += "".join(stream)
    # Letter by letter: where does any stop string end first, and which of those there is longest?
    for end_of_text in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end_of_text].endswith(s)]
        if ending:
            assert got == text[: end_of_text - max(map(len, ending))]
            assert stream.finish_reason is FinishReason.STOP
            return
    assert got == text
    assert stream.finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_generation_and_counts_only_what_was_used() -> None:
    end = channel(("END",))
    told: list[int] = []
    end.on_change(lambda: told.append(1))
    stream = ChunkStream(end)
    fill(end, "yes END and more", None)
    assert list(stream) == ["yes "]
    assert told == [1]
    assert stream.finish_reason is FinishReason.STOP
    assert stream.usage.completion_tokens == len("yes END")
    assert stream.text() == "yes "


def test_the_end_is_told_once_however_it_comes() -> None:
    for end_it in (
        lambda c: c.finish(FinishReason.STOP),
        lambda c: c.fail(ImageDecodeError("broken")),
        lambda c: c.cancel(),
        lambda c: c.expire(),
        lambda c: c.abort(ImageDecodeError("broken")),
    ):
        told: list[Channel] = []
        end = Channel(on_end=told.append)
        end_it(end)
        end.cancel()
        end.fail(ImageDecodeError("again"))
        assert told == [end]


def test_only_an_end_from_outside_is_told_to_those_who_work_on_it() -> None:
    for inside, end_it in (
        (True, lambda c: c.finish(FinishReason.STOP)),
        (True, lambda c: c.fail(ImageDecodeError("broken"))),
        (False, lambda c: c.abort(ImageDecodeError("broken"))),
        (False, lambda c: c.expire()),
    ):
        end = Channel()
        told: list[int] = []
        end.on_change(lambda told=told: told.append(1))
        end_it(end)
        assert told == ([] if inside else [1])


def test_timings_are_of_stages_in_order() -> None:
    end = channel()
    end.stamp("queued")
    end.stamp("image")
    fill(end, "a")
    stream = ChunkStream(end)
    stream.text()
    times = stream.timings
    assert None not in (times.queued, times.image, times.first_token, times.total)
    assert 0 <= times.queued <= times.image <= times.first_token <= times.total


def test_many_producers_and_a_collector_that_cancels_in_the_middle_of_it() -> None:
    """Garbage collection may run `ChunkStream.__del__` inside any channel method."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            end = channel()
            stream = ChunkStream(end)
            cycle: list[object] = [stream]
            cycle.append(cycle)
            threads = [in_thread(lambda end=end: fill(end, "x" * 20, None)) for _ in range(2)]
            del stream, cycle
            gc.collect()
            for thread in threads:
                thread.join()
            assert end.cancelled
    finally:
        sys.setswitchinterval(before)
