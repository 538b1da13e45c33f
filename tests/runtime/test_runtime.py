"""DeviceRuntime on the CPU against transformers: batched, shared, preempted, aborted, resized."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from support.runtime import Sink, World, running, settled, until

from llava_engine import FinishReason, SamplingParams
from llava_engine.errors import MemoryExhausted
from llava_engine.kernels.preprocess import DecodedPicture
from llava_engine.network.attention import DensePrefill, PrefillAttention
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.picture_encoder import PictureEncoder
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.scheduler import Scheduled


@dataclass
class Request:
    picture: int | None
    question: list[int]
    count: int


def requests(seed: int, count: int, vocab: int) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            chance.choice([None, 0, 0, 0, 1, 2, 3, 4, 5]),
            [chance.randrange(3, vocab) for _ in range(chance.randint(1, 30))],
            chance.randint(1, 16),
        )
        for _ in range(count)
    ]


def test_batched_equals_alone_and_transformers(world: World, runtime: DeviceRuntime) -> None:
    chance = random.Random(1)
    asked = requests(1, 64, 400)
    sinks = [Sink(chance.randint(1, 5) if chance.random() < 0.2 else None) for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(request.picture, request.question, request.count, sink))
        if chance.random() < 0.3:
            time.sleep(0.01)  # arrive while others run
    for sink in sinks:
        assert sink.ended.wait(60)
    settled(runtime)
    for request, sink in zip(asked, sinks, strict=True):
        want = world.expected(request.picture, request.question, request.count)
        if sink.reason is FinishReason.CANCELLED:
            assert sink.cancelled and sink.tokens == want[: len(sink.tokens)]
        else:
            assert sink.reason is FinishReason.LENGTH and sink.tokens == want
    for request in asked[:8]:
        alone = Sink()
        runtime.submit(world.sequence(request.picture, request.question, request.count, alone))
        assert alone.wait() == world.expected(request.picture, request.question, request.count)


def test_chunks_over_dense_keys_give_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, chunks and cached prefixes, beside decoding rows and alone."""
    plans: list[DensePrefill | None] = []
    plan = PrefillAttention.plan

    def watched(self: PrefillAttention, *arguments: Any) -> DensePrefill | None:
        plans.append(plan(self, *arguments))
        return plans[-1]

    monkeypatch.setattr(PrefillAttention, "plan", watched)
    asked = requests(8, 24, 400)
    for runtime in running(world, blocks=400, attention="torch"):
        sinks = [Sink() for _ in asked]
        for request, sink in zip(asked, sinks, strict=True):
            runtime.submit(world.sequence(request.picture, request.question, request.count, sink))
        for request, sink in zip(asked, sinks, strict=True):
            want = world.expected(request.picture, request.question, request.count)
            assert sink.wait() == want
    kinds = {(made.num_paged > 0, made.cache_rows is not None) for made in plans if made}
    assert (True, True) in kinds  # gathered keys, beside decoding rows


def test_a_prefix_hit_equals_a_cold_run(world: World, runtime: DeviceRuntime) -> None:
    want = {q: world.expected(0, [q, 11, 12], 8) for q in (20, 30)}
    cold, warm, other, salted = Sink(), Sink(), Sink(), Sink()
    runtime.submit(world.sequence(0, [20, 11, 12], 8, cold))
    assert cold.wait() == want[20] and cold.cached == 0
    runtime.submit(world.sequence(0, [30, 11, 12], 8, warm))
    assert warm.wait() == want[30]
    prefix = 1 + world.ours.config.image_tokens
    assert warm.cached == prefix // 8 * 8
    runtime.submit(world.sequence(1, [30, 11, 12], 8, other))  # a picture one pixel apart
    assert other.wait() == world.expected(1, [30, 11, 12], 8)
    assert other.cached == 0
    runtime.submit(world.sequence(0, [30, 11, 12], 8, salted, cache_salt=b"tenant"))
    assert salted.wait() == want[30] and salted.cached == 0


def test_a_picture_is_encoded_once_for_all_who_wait_for_it(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = type(world.ours).encode_images

    def counting(self: LlavaModel, patches: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        encoded.append(patches.shape[0])
        return original(self, patches, rows)

    monkeypatch.setattr(type(world.ours), "encode_images", counting)
    sinks = [Sink() for _ in range(12)]
    for index, sink in enumerate(sinks):
        runtime.submit(world.sequence(index % 2, [20 + index], 4, sink))
    for index, sink in enumerate(sinks):
        assert sink.wait() == world.expected(index % 2, [20 + index], 4)
    assert sum(encoded) == 2


def test_a_picture_that_comes_is_encoded_while_others_decode(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside their steps in flight, and not again in its own; one that fails fails there."""
    decoding: list[bool] = []
    encode = PictureEncoder.__call__

    def watched(self: PictureEncoder, pictures: list[DecodedPicture]) -> list[torch.Tensor]:
        decoding.append(runtime._decoder.decodes)
        if decoding == [True]:
            raise ValueError("planted")
        return encode(self, pictures)

    sinks = [Sink(), Sink(), Sink()]

    def on_tokens(events: list[TokenEvent]) -> None:
        index = {3: 1, 9: 2}.get(len(sinks[0].tokens))
        if index is not None:
            runtime.submit(world.sequence(index, [30], 5, sinks[index]))

    monkeypatch.setattr(PictureEncoder, "__call__", watched)
    for made in running(world, 400, on_tokens):
        runtime = made
        runtime.submit(world.sequence(None, [60], 16, sinks[0]))
        assert sinks[0].wait() == world.expected(None, [60], 16)
        for index in (1, 2):
            assert sinks[index].wait() == world.expected(index, [30], 5)
        settled(runtime)
    assert decoding == [True, False, True]


@pytest.mark.parametrize("image_cache_mb", [0, 64])
def test_preemption_changes_no_token(world: World, image_cache_mb: int) -> None:
    asked = [Request(i % 6, [30 + i, 31], 24) for i in range(10)]
    prompt = 3 + world.ours.config.image_tokens
    blocks = 2 * -(-(prompt + 24) // 8)  # room for two or three of ten
    for small in running(world, blocks, image_cache_mb=image_cache_mb):
        sinks = [Sink() for _ in asked]
        for request, sink in zip(asked, sinks, strict=True):
            small.submit(world.sequence(request.picture, request.question, request.count, sink))
        for request, sink in zip(asked, sinks, strict=True):
            want = world.expected(request.picture, request.question, request.count)
            assert sink.wait() == want
        settled(small)


def test_a_share_that_comes_or_goes_changes_no_token(world: World, runtime: DeviceRuntime) -> None:
    asked = [Request(i % 6, [40 + i], 40) for i in range(8)]
    sinks = [Sink() for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(request.picture, request.question, request.count, sink))
    memory = runtime.memory_bytes()
    runtime.add_worker("two", 100 * runtime.kv_block_bytes)
    assert runtime.num_blocks == 500
    assert runtime.memory_bytes() >= memory + 100 * runtime.kv_block_bytes
    runtime.remove_worker("two")
    runtime.add_worker("three", 20 * runtime.kv_block_bytes)
    runtime.remove_worker("one")
    assert runtime.num_blocks == 20
    for request, sink in zip(asked, sinks, strict=True):
        want = world.expected(request.picture, request.question, request.count)
        assert sink.wait() == want
    settled(runtime)


@pytest.mark.parametrize("grows", [False, True], ids=["shrink", "grow"])
def test_a_resize_that_fails_half_way_changes_no_token(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    runtime.add_worker("two", 20 * runtime.kv_block_bytes)
    asked = [Request(i % 6, [40 + i], 40) for i in range(8)]
    sinks = [Sink() for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(request.picture, request.question, request.count, sink))
    resize = KVCache.resize

    def half_way(self: KVCache, num_blocks: int, moves: dict[int, int]) -> None:
        monkeypatch.undo()
        values, self.values = self.values, []
        resize(self, num_blocks, moves)  # the keys, and the blocks that move among them
        self.values = values
        raise torch.OutOfMemoryError("no")

    while not sinks[0].tokens:
        time.sleep(0.001)
    monkeypatch.setattr(KVCache, "resize", half_way)
    if grows:
        with pytest.raises(MemoryExhausted):
            runtime.add_worker("three", 20 * runtime.kv_block_bytes)
        assert runtime.num_blocks == 420
    else:
        runtime.remove_worker("one")
        assert runtime.num_blocks == 20
    for request, sink in zip(asked, sinks, strict=True):
        want = world.expected(request.picture, request.question, request.count)
        assert sink.wait() == want
    settled(runtime)


def test_sampled_tokens_depend_on_the_seed_alone(world: World, runtime: DeviceRuntime) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, ignore_eos=True)

    def sample(count: int) -> list[list[int]]:
        sinks = [Sink() for _ in range(count)]
        for index, sink in enumerate(sinks):
            runtime.submit(world.sequence(0, [50], 12, sink, sampling=sampling, seed=index % 4))
        return [sink.wait() for sink in sinks]

    alone = [sample(1)[0] for _ in range(2)]
    assert alone[0] == alone[1]
    together = sample(16)
    assert together[0] == alone[0]
    assert together[:4] == together[4:8] == together[12:]
    assert len({tuple(tokens) for tokens in together}) == 4

    # So hot that the noise alone decides: it must be another at each position.
    hot = Sink()
    sampling = SamplingParams(temperature=1e6, ignore_eos=True)
    runtime.submit(world.sequence(0, [50], 12, hot, sampling=sampling))
    assert len(set(hot.wait())) > 6


def test_an_abort_storm_leaves_nothing_and_touches_nobody(
    world: World, runtime: DeviceRuntime
) -> None:
    chance = random.Random(5)
    sinks: list[tuple[Sink, Request]] = []
    want: dict[tuple[int | None, int], list[int]] = {}
    for index in range(2000):
        request = Request(chance.choice([0, 1, 2]), [chance.randrange(3, 20)], 6)
        survivor = index % 100 == 0
        sink = Sink(None if survivor else chance.choice([None, 1, 2, 3]))
        runtime.submit(world.sequence(request.picture, request.question, request.count, sink))
        sinks.append((sink, request))
        if not survivor and sink.cancel_after is None:
            sink.cancelled = True  # before, during or after its prefill, as it happens
            if chance.random() < 0.2:
                runtime.wake()
    for sink, request in sinks:
        assert sink.ended.wait(60)
        place = (request.picture, request.question[0])
        if place not in want:
            want[place] = world.expected(request.picture, request.question, request.count)
        assert sink.tokens == want[place][: len(sink.tokens)]
        if not sink.cancelled:
            assert sink.tokens == want[place]
    settled(runtime)


@pytest.mark.parametrize("other_fails", [False, True])
def test_a_reader_is_told_of_a_token_before_the_runtime_rests(
    world: World, other_fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its sequence is paused and the other one's step fails."""
    run = ModelRunner.run

    def picky(
        self: ModelRunner, step: list[Scheduled], launched: Callable[[], None]
    ) -> list[int | None]:
        if other_fails and any(entry.sequence.seed == 7 for entry in step):
            raise ValueError("planted")
        return run(self, step, launched)

    monkeypatch.setattr(ModelRunner, "run", picky)
    paused, other = Sink(room=1), Sink()
    for runtime in running(world, 400):
        runtime.submit(world.sequence(None, [60] * 23, 5, paused))  # all that a step takes
        runtime.submit(world.sequence(None, [61], 1, other, seed=7))
        until(other.ended.is_set)
        until(lambda: paused.flushed == 1)
        paused.cancelled = True
        settled(runtime)
    assert (other.error is not None) == other_fails


@pytest.mark.parametrize("asynchronous", [False, True])
def test_readers_are_woken_when_the_device_has_work(
    world: World, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would wait while they take Python's lock between the steps of other prompts; on the CPU
    they would wait for a whole step."""
    first, long, told = Sink(), Sink(), []
    prefill, submitted = LlavaModel.prefill, threading.Event()

    def watched(self: LlavaModel, *arguments: Any) -> None:
        submitted.wait()
        told.append(len(first.tokens) - first.flushed)
        prefill(self, *arguments)

    monkeypatch.setattr(LlavaModel, "prefill", watched)
    for runtime in running(world, 400):
        runtime.submit(world.sequence(None, [60] * 23, 5, first))
        runtime.submit(world.sequence(None, [61] * 100, 1, long))
        runtime._steps._asynchronous = asynchronous
        submitted.set()
        first.wait()
        long.wait()
        settled(runtime)
    assert told[1:4] == [int(asynchronous)] * 3


def test_an_idle_runtime_uses_no_processor(runtime: DeviceRuntime) -> None:
    native = runtime._thread.native_id
    process = psutil.Process()

    def used() -> float:
        (mine,) = [t for t in process.threads() if t.id == native]
        return mine.user_time + mine.system_time

    settled(runtime)
    before = used()
    time.sleep(0.3)
    assert used() - before <= 0.02
