"""DeviceRuntime on the GPU, with its own kernels, against transformers on the same GPU.

Tokens must be the same, or part first at a near tie: where the oracle's two best logits lie closer
together than the two implementations' measured errors on both can move them.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU, NEW_TOKENS, Sink, World
from support.pictures import random_pictures
from transformers import LlavaForConditionalGeneration

from llava_engine import EngineConfig
from llava_engine.errors import KernelsNotBuilt
from llava_engine.kernels import library
from llava_engine.kernels.library import require_kernels
from llava_engine.network.weights import load_model
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, seed=3, text_config={"head_dim": 16})
    dtype: torch.dtype = request.param
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval().to(GPU)
    ours = load_model(directory, device=GPU, dtype=dtype)
    pictures = random_pictures(0, 6, ours.config.vision.image_size)
    made = World(ours, theirs, pictures)
    made.measure(questions(7, 8))
    assert made.error < {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}[dtype]
    return made


@pytest.fixture
def runtime(world: World) -> Iterator[DeviceRuntime]:
    yield from running(world)


def running(world: World, **options: object) -> Iterator[DeviceRuntime]:
    config = EngineConfig(
        device="cuda", **{"block_size": 16, "prefill_chunk": 40, "max_batch": 32, **options}
    )
    if config.kernels == "auto":
        require_kernels(GPU)
    made = DeviceRuntime(world.ours, device=GPU, config=config)
    made.add_worker("one", 400 * made.kv_block_bytes)
    yield made
    made.close()


def questions(seed: int, count: int) -> list[tuple[int | None, list[int]]]:
    chance = random.Random(seed)
    return [
        (
            chance.choice([None, 0, 0, 1, 2, 3, 4, 5]),
            [chance.randrange(3, 400) for _ in range(chance.randint(1, 30))],
        )
        for _ in range(count)
    ]


def settled(runtime: DeviceRuntime) -> None:
    deadline = time.monotonic() + 30
    while runtime.load() and time.monotonic() < deadline:
        runtime.wake()
        time.sleep(0.005)
    assert runtime.load() == 0
    assert runtime.num_free_blocks == runtime.num_blocks


def test_batched_and_alone_are_transformers(
    world: World, runtime: DeviceRuntime, record_property: Callable[[str, object], None]
) -> None:
    asked = questions(random.SystemRandom().randrange(1 << 30), 32)
    print("asked", asked)
    world.measure(asked)
    sinks = [Sink() for _ in asked]
    for (picture, question), sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(picture, question, sink))
    same = [world.agrees(*request, sink.wait()) for request, sink in zip(asked, sinks, strict=True)]
    settled(runtime)
    record_property("identical", f"{sum(same)} of {len(same)}")
    record_property("logit_error", world.error)
    for request in asked[:6]:
        alone = Sink()
        runtime.submit(world.sequence(*request, alone))
        world.agrees(*request, alone.wait())


def test_a_prefix_hit_is_as_a_cold_run(world: World, runtime: DeviceRuntime) -> None:
    asked: list[tuple[int, list[int]]] = [(0, [20, 11, 12]), (0, [30, 11, 12])]
    world.measure(asked)
    cold, warm = Sink(), Sink()
    runtime.submit(world.sequence(*asked[0], cold))
    world.agrees(*asked[0], cold.wait())
    runtime.submit(world.sequence(*asked[1], warm))
    world.agrees(*asked[1], warm.wait())
    assert cold.cached == 0
    assert warm.cached == (1 + world.ours.config.image_tokens) // 16 * 16


def test_an_abort_storm_leaves_no_block_and_no_memory(world: World, runtime: DeviceRuntime) -> None:
    def storm(count: int) -> None:
        chance = random.Random(5)
        sinks = []
        for index in range(count):
            sink = Sink(None if index % 50 == 0 else chance.choice([0, 1, 2, 3]))
            question = [chance.randrange(3, 400)]
            runtime.submit(world.sequence(chance.choice([0, 1, 2]), question, sink))
            sinks.append(sink)
        for sink in sinks:
            sink.wait()
        settled(runtime)

    storm(20)  # the pictures that are kept, and torch's own first allocations
    gc.collect()
    torch.cuda.synchronize()
    before, threads = torch.cuda.memory_allocated(), threading.active_count()
    storm(500)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert threading.active_count() == threads


def test_slow_readers_get_every_token_and_none_before_they_have_room(
    world: World, runtime: DeviceRuntime
) -> None:
    """A row that may go on for some steps only is idle after them, in a run of the others too."""
    asked = questions(11, 8)
    world.measure(asked)
    sinks = [Sink(room=(3, 7, 1 << 30)[index % 3]) for index in range(8)]
    for request, sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(*request, sink))
    slow = [sink for index, sink in enumerate(sinks) if index % 3 < 2]
    for request, sink in zip(asked, sinks, strict=True):
        if sink not in slow:
            world.agrees(*request, sink.wait())
    until = time.monotonic() + 30
    while any(not sink.ended.is_set() for sink in slow):
        assert time.monotonic() < until
        for sink in slow:
            if sink.room == 0:
                sink.room = 5
                runtime.wake()
        time.sleep(0.001)
    for request, sink in zip(asked, sinks, strict=True):
        assert len(sink.wait()) == NEW_TOKENS
        world.agrees(*request, sink.tokens)
    settled(runtime)


def test_references_run_where_asked_and_nowhere_else(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a library only kernels="reference" runs; nothing falls back by itself."""
    request = (0, [20, 11, 12])
    world.measure([request])
    for auto in running(world):
        monkeypatch.setattr(library, "_loaded", False)
        monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
        for slow in running(world, kernels="reference"):
            sink = Sink()
            slow.submit(world.sequence(*request, sink))
            world.agrees(*request, sink.wait())
        sink = Sink()
        auto.submit(world.sequence(*request, sink))
        with pytest.raises(KernelsNotBuilt):
            sink.wait()
        monkeypatch.undo()
        sink = Sink()
        auto.submit(world.sequence(*request, sink))
        world.agrees(*request, sink.wait())
