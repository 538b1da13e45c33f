"""Streams that are read slowly, late or never, with the demo checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from support.pool_fakes import model_of
from support.runtime import until

import llava_engine
from llava_engine import EngineConfig, PoolConfig, RequestTimeout, VisionModel, WorkerPool
from llava_engine.channel import Channel
from llava_engine.runtime.runtime import DeviceRuntime

QUERY = "Describe the picture."
LIMIT = 6
LONG: dict[str, Any] = {"max_new_tokens": 64, "ignore_eos": True}


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(PoolConfig(max_workers=1)) as made:
        yield made


def load(pool: WorkerPool, **options: object) -> VisionModel:
    config = EngineConfig(device="cpu", kv_cache_mb=16, max_batch=2, **options)
    return llava_engine.get("llava-tiny", config, pool=pool)


def picture() -> Image.Image:
    image = Image.new("RGB", (112, 112), (200, 200, 190))
    image.paste((200, 30, 30), (10, 10, 50, 50))
    return image


def runtime_of(pool: WorkerPool, model: VisionModel) -> DeviceRuntime:
    (worker,) = model_of(pool, model.registry_key).live_workers
    return worker.backend._runtime  # type: ignore[union-attr]


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most tokens that any channel has held."""
    seen, put = [0], Channel.put

    def watched(self: Channel, token_id: int) -> None:
        put(self, token_id)
        seen[0] = max(seen[0], len(self._tokens))

    monkeypatch.setattr(Channel, "put", watched)
    return seen


def test_late_readers_get_the_whole_text_and_held_up_nobody(
    pool: WorkerPool, most: list[int]
) -> None:
    want = load(pool).describe_image(picture(), QUERY, **LONG).text()
    assert most[0] <= 64
    most[0] = 0
    model = load(pool, max_unread_tokens=LIMIT)
    # More than the batch has places for, so each must have left its own for the last to begin.
    streams = [model.describe_image(picture(), QUERY, **LONG) for _ in range(6)]
    assert streams[-1].text() == want
    until(lambda: len(runtime_of(pool, model)._scheduler.paused) == 5)
    assert most[0] == LIMIT
    runtime = runtime_of(pool, model)
    assert runtime.num_free_blocks == runtime.num_blocks
    for stream in reversed(streams):
        assert stream.text() == want
        assert stream.usage.completion_tokens == 64

    async def read(stream: llava_engine.ChunkStream) -> str:
        async for _ in stream:
            await asyncio.sleep(0.005)
        return await stream.atext()

    async def main() -> list[str]:
        streams = [model.describe_image(picture(), QUERY, **LONG) for _ in range(4)]
        return await asyncio.gather(*map(read, streams))

    assert asyncio.run(main()) == [want] * 4
    assert most[0] == LIMIT


def test_a_paused_stream_that_is_left_or_timed_out_holds_nothing(pool: WorkerPool) -> None:
    model = load(pool, max_unread_tokens=LIMIT)
    model.describe_image(picture(), QUERY, max_new_tokens=1).text()
    runtime = runtime_of(pool, model)

    def ask(**options: Any) -> llava_engine.ChunkStream:
        stream = model.describe_image(picture(), QUERY, **LONG, **options)
        until(lambda: len(runtime._scheduler.paused) == 1)
        return stream

    for leave in ("cancel", "close", "drop"):
        stream = ask()
        if leave != "drop":
            getattr(stream, leave)()
        del stream
        until(lambda: runtime.load() == 0)
    late = ask(timeout=1.0)
    until(lambda: runtime.load() == 0)
    with pytest.raises(RequestTimeout):
        late.text()
    assert runtime.num_free_blocks == runtime.num_blocks
