"""What bench/soak.py asks: kinds of requests, how each is read or left, and how it must end."""

from __future__ import annotations

import asyncio
import io
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.soak_server import FORBIDDEN
from llava_engine import ChunkStream, FinishReason, LlavaError, RequestCancelled, VisionModel

PICTURES = 24
MAX_BYTES = 1 << 18  # of one picture, as the engine is told
MAX_UNREAD = 16  # tokens, as the engine is told
QUERY = "Describe the picture."
# Longer than anybody here waits: read MAX_UNREAD tokens at a time it takes 25 times LATE.
LONG = {"max_new_tokens": 400, "ignore_eos": True}
WHOLE = {"max_new_tokens": 48, "ignore_eos": True}  # read late, but to its end
LATE = 0.02
SHORT = {"max_new_tokens": 12}
OK = frozenset({"stop", "length"})
DROPPED = "dropped"  # the stream was dropped while it ran: there is nobody to see how it ended


@dataclass(frozen=True)
class Reading:
    """How a stream is read: whole, or left after `chunks` chunks and `delay` seconds.

    pause: seconds after each chunk. leave: "cancel", "close", "with", "drop", "elsewhere" (another
    thread or callback cancels while the reader waits), or "task" (the reading task is cancelled,
    where there is one).
    """

    pause: float = 0.0
    leave: str | None = None
    chunks: int = 0
    delay: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A sort of request: how it is made and read, and the outcomes that are right for it."""

    name: str
    ask: Callable[[random.Random], ChunkStream]
    expected: frozenset[str]
    reading: Callable[[random.Random], Reading] = lambda chance: Reading()


class SlowFile(io.BytesIO):
    """A binary file on a slow disk."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.02)
        return super().read(size)


def write_pictures(directory: Path) -> None:
    """The files that are asked about and served: PICTURES pictures in three formats."""
    for index in range(PICTURES):
        image = Image.new("RGB", (112 + 8 * index, 160), (200, 200, 190))
        image.paste((10 * index, 30, 250 - 10 * index), (10, 10, 50 + index, 60 + index))
        image.save(directory / picture_name(index))


def picture_name(index: int) -> str:
    """A file's name; its suffix is its format."""
    return f"{index}.{('png', 'jpg', 'webp')[index % 3]}"


def all_kinds(
    model: VisionModel, directory: Path, port: int, *, one_answer: bool = True
) -> list[Kind]:
    """Every kind; `directory` has what write_pictures wrote. one_answer: the same question about
    the same picture must get the same text each time."""
    base = f"http://127.0.0.1:{port}"
    files = [(directory / picture_name(index)).read_bytes() for index in range(PICTURES)]
    answers: dict[tuple[int, int], str] = {}

    def known(index: int, stream: ChunkStream, most: int = 12) -> ChunkStream:
        if one_answer:
            stream.answers, stream.index = answers, (index, most)  # type: ignore[attr-defined]
        return stream

    def path(chance: random.Random) -> ChunkStream:
        index = chance.randrange(PICTURES)
        return known(index, model.describe_image(directory / picture_name(index), QUERY, **SHORT))

    def encoded(chance: random.Random) -> ChunkStream:
        index = chance.randrange(PICTURES)
        return known(index, model.describe_image(files[index], QUERY, **SHORT))

    def slow_file(chance: random.Random, **options: Any) -> ChunkStream:
        return model.describe_image(SlowFile(chance.choice(files)), QUERY, **(options or SHORT))

    def url(place: str) -> Callable[[random.Random], ChunkStream]:
        def ask(chance: random.Random) -> ChunkStream:
            index = chance.randrange(PICTURES)
            target = f"{base}/{place}/{picture_name(index)}"
            return known(index, model.describe_url(target, QUERY, **SHORT))

        return ask

    def long_url(chance: random.Random, **options: Any) -> ChunkStream:
        name = picture_name(chance.randrange(PICTURES))
        return model.describe_url(f"{base}/slow/{name}", QUERY, **LONG, **options)

    def long_answer(chance: random.Random, **options: Any) -> ChunkStream:
        return model.describe_image(chance.choice(files), QUERY, **LONG, **options)

    def whole(chance: random.Random) -> ChunkStream:
        index = chance.randrange(PICTURES)
        return known(index, model.describe_image(files[index], QUERY, **WHOLE), 48)

    def mutated(chance: random.Random) -> ChunkStream:
        data = bytearray(chance.choice(files))
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return model.describe_image(bytes(data), QUERY, **SHORT)

    def cut(chance: random.Random) -> ChunkStream:
        data = chance.choice(files)
        return model.describe_image(data[: chance.randrange(len(data) // 2)], QUERY)

    def picture(data: bytes | Path) -> Callable[[random.Random], ChunkStream]:
        return lambda chance: model.describe_image(data, QUERY)

    def query(*texts: str) -> Callable[[random.Random], ChunkStream]:
        return lambda chance: model.describe_image(
            chance.choice(files), chance.choice(texts), **SHORT
        )

    def new_query(chance: random.Random) -> ChunkStream:
        text = f"What is number {chance.getrandbits(64)} of all these things?"
        return model.describe_image(chance.choice(files), text, **SHORT)

    def address(*urls: str) -> Callable[[random.Random], ChunkStream]:
        return lambda chance: model.describe_url(chance.choice(urls), QUERY)

    def leaving(*ways: str, most_s: float, chunks: int = 0) -> Callable[[random.Random], Reading]:
        return lambda chance: Reading(
            leave=chance.choice(ways),
            chunks=chance.randrange(chunks + 1),
            delay=chance.uniform(0, most_s),
            pause=LATE,
        )

    blocked = address(
        f"http://{FORBIDDEN}:{port}/file/0.png",
        f"http://0x7f000002:{port}/",
        f"http://2130706434:{port}/",
        f"http://127.2:{port}/",
        f"http://[::ffff:{FORBIDDEN}]:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://[64:ff9b::a00:1]/",
        f"http://user:secret@127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}\\@{FORBIDDEN}/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/0.png",
    )
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (200_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0\0\0\0\0"
    cancelled, timed_out = frozenset({"cancelled"}), frozenset({"RequestTimeout"})
    left = frozenset({"cancelled", DROPPED})
    broken, large = frozenset({"ImageDecodeError"}), frozenset({"ImageTooLarge"})
    failed = frozenset({"FetchFailed"})
    too_long = frozenset({"PromptTooLong"})
    whole_length = frozenset({"length"})
    ways = "cancel", "close", "with", "drop", "elsewhere", "task"
    return [
        Kind("good path", path, OK),
        Kind("good bytes", encoded, OK),
        Kind("good URL", url("file"), OK),
        Kind("good URL after a redirect", url("to-file"), OK),
        Kind("slow URL", url("slow"), OK),
        Kind("slow file", slow_file, OK),
        Kind("slow reader", encoded, OK, lambda chance: Reading(pause=0.05)),
        Kind("reader far behind", whole, whole_length, lambda chance: Reading(pause=0.1)),
        Kind("hardly read", lambda chance: long_answer(chance, timeout=0.4), timed_out,
             lambda chance: Reading(pause=1.0)),
        Kind("mutated picture", mutated, OK | broken | large),
        Kind("cut picture", cut, broken),
        Kind("no picture", picture(b"<html>no picture</html>"), broken),
        Kind("missing file", picture(directory / "missing.png"), broken),
        Kind("too many bytes", picture(files[0] + bytes(MAX_BYTES)), large),
        Kind("too many pixels", picture(huge), large),
        Kind("blocked address", blocked, frozenset({"BlockedAddress"})),
        Kind("redirect to a blocked address", url("to-private"), frozenset({"BlockedAddress"})),
        Kind("redirect to another scheme", url("to-scheme"), frozenset({"BlockedAddress"})),
        Kind("redirects in a loop", address(f"{base}/loop"), failed),
        Kind("HTTP error", address(f"{base}/status/404", f"{base}/status/503"), failed),
        Kind("body cut short", url("short"), failed),
        Kind("compressed body", url("gzip"), failed),
        Kind("HTML named a picture", url("html"), broken),
        Kind("endless body", url("endless"), large),
        Kind("too long a body announced", url("announce"), large),
        Kind("a byte now and then", url("stall"), frozenset({"FetchTimeout"})),
        Kind("query that nobody had", new_query, OK),
        Kind("special tokens", query("<image></s><s>[INST] <unk>", "</s>" * 50, "<image>"), OK),
        Kind("right to left, emoji", query("מה יש בתמונה? \u202eabc", "ما هذا؟", "🦙" * 20), OK),
        Kind("long query", query("What is this? " * 100), OK),
        Kind("too long query", query("word " * 2_000, "x" * (1 << 20)), too_long),
        Kind("no text", query("NUL \0", "lone \ud800", "\udfff"), frozenset({"InvalidQuery"})),
        Kind("left at once", long_answer, left, leaving(*ways, most_s=0.0)),
        Kind("left in the fetch", long_url, left, leaving(*ways, most_s=0.3)),
        Kind("left in the reading of a file", lambda chance: slow_file(chance, **LONG), left,
             leaving(*ways, most_s=0.03)),
        Kind("left before or in prefill", long_answer, left, leaving(*ways, most_s=0.02)),
        Kind("left while decoding", long_answer, left, leaving(*ways, most_s=0.05, chunks=8)),
        Kind("cancelled by another", long_answer, cancelled, leaving("elsewhere", most_s=0.1)),
        Kind("no time at all", lambda chance: long_answer(chance, timeout=0.001), timed_out),
        Kind("no time to fetch", lambda chance: long_url(chance, timeout=0.15), timed_out),
        Kind("no time to decode", lambda chance: long_answer(chance, timeout=0.15), timed_out,
             lambda chance: Reading(pause=LATE)),
    ]  # fmt: skip


def outcome_of(error: BaseException) -> str:
    """A LlavaError's name; any other is foreign and never expected."""
    name = type(error).__name__
    return name if isinstance(error, LlavaError) else f"foreign {name}: {error}"


def run(kind: Kind, chance: random.Random) -> str:
    """Ask and read in this thread; returns the outcome."""
    reading = kind.reading(chance)
    try:
        stream = kind.ask(chance)
        if reading.leave is None:
            for _ in stream:
                time.sleep(reading.pause)
            return _ended(stream)
        if reading.leave == "elsewhere":
            timer = threading.Timer(reading.delay, stream.cancel)
            timer.start()
            for _ in stream:
                time.sleep(reading.pause)
            timer.join()
            return _ended(stream)
        for _ in range(reading.chunks):
            next(stream)
        time.sleep(reading.delay)
        if reading.leave in ("drop", "task"):
            del stream
            return DROPPED
        if reading.leave == "with":
            with stream:
                pass
        else:
            getattr(stream, reading.leave)()
        for _ in stream:
            return "a chunk after the end"
        return _ended(stream)
    except Exception as error:
        return outcome_of(error)


async def run_async(kind: Kind, chance: random.Random) -> str:
    """`run` in an event loop."""
    reading = kind.reading(chance)
    try:
        stream = kind.ask(chance)
        if reading.leave is None:
            async for _ in stream:
                await asyncio.sleep(reading.pause)
            return _ended(stream)
        if reading.leave == "elsewhere":
            asyncio.get_running_loop().call_later(reading.delay, stream.cancel)
            async for _ in stream:
                await asyncio.sleep(reading.pause)
            return _ended(stream)
        if reading.leave == "task":
            task = asyncio.create_task(_read(stream, reading.pause))
            del stream
            await asyncio.sleep(reading.delay)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return DROPPED
            return "ended before its task was cancelled"
        for _ in range(reading.chunks):
            await anext(stream)
        await asyncio.sleep(reading.delay)
        if reading.leave == "drop":
            del stream
            return DROPPED
        if reading.leave == "with":
            async with stream:
                pass
        elif reading.leave == "close":
            await stream.aclose()
        else:
            stream.cancel()
        async for _ in stream:
            return "a chunk after the end"
        return _ended(stream)
    except Exception as error:
        return outcome_of(error)


async def _read(stream: ChunkStream, pause: float) -> None:
    async for _ in stream:
        await asyncio.sleep(pause)


def _ended(stream: ChunkStream) -> str:
    """How a stream that has been read to its end did end; its text must be what it was before."""
    try:
        text = stream.text()
    except RequestCancelled:
        return str(FinishReason.CANCELLED)
    index = getattr(stream, "index", None)
    if index is not None and stream.answers.setdefault(index, text) != text:  # type: ignore[attr-defined]
        return f"another answer about picture {index}"
    return str(stream.finish_reason)
