"""Failures in DeviceRuntime: whose they are, what they end as, and what goes on beside them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from support.pictures import picture as decoded
from support.pictures import values
from support.runtime import Sink, World, running, settled

from llava_engine.errors import MemoryExhausted, RequestFailed, WorkerDied
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.failures import MemoryErrors
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Picture


def test_one_broken_picture_fails_one_stream(world: World, runtime: DeviceRuntime) -> None:
    good = [Sink() for _ in range(4)]
    bad = Sink()
    for index, sink in enumerate(good[:2]):
        runtime.submit(world.sequence(index, [60], 6, sink))
    broken = world.sequence(2, [60], 6, bad)
    key = b"broken".ljust(16)
    picture = Picture(key, 1, broken.pictures[0].length, decoded(np.zeros((5, 7, 3), np.uint8)))
    broken.pictures = (picture,)
    runtime.submit(broken)
    for index, sink in enumerate(good[2:], 2):
        runtime.submit(world.sequence(index, [60], 6, sink))
    with pytest.raises(RequestFailed) as raised:
        bad.wait()
    assert raised.value.__cause__ is not None
    for index, sink in enumerate(good):
        assert sink.wait() == world.expected(index, [60], 6)
    settled(runtime)


def test_out_of_memory_in_a_request_is_its_own(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(world.ours).encode_images

    red = torch.from_numpy(values(world.pictures[5])[0, 0, :4])

    def greedy(self: LlavaModel, patches: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if (patches[:, 0, :4] == red).all(dim=1).any():
            raise torch.OutOfMemoryError("no")
        return original(self, patches, rows)

    monkeypatch.setattr(type(world.ours), "encode_images", greedy)
    hungry, modest = Sink(), Sink()
    runtime.submit(world.sequence(5, [60], 6, hungry))
    runtime.submit(world.sequence(2, [60], 6, modest))
    with pytest.raises(MemoryExhausted):
        hungry.wait()
    assert modest.wait() == world.expected(2, [60], 6)


def test_out_of_memory_within_an_op_is_out_of_memory(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it comes as a RuntimeError and is seen by torch's count alone."""

    def prefill(*args: object) -> None:
        raise RuntimeError("aoti_torch_aten_new_empty failed")

    monkeypatch.setattr(type(world.ours), "prefill", prefill)
    for out_of_memory, expected in ((True, MemoryExhausted), (False, RequestFailed)):
        monkeypatch.setattr(MemoryErrors, "happened", lambda self, happened=out_of_memory: happened)
        sink = Sink()
        runtime.submit(world.sequence(None, [60], 6, sink))
        with pytest.raises(expected):
            sink.wait()


def test_what_a_failed_step_held_is_free_before_the_next_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(world.ours).encode_images
    entered, release = threading.Event(), threading.Event()
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def hungry(self: LlavaModel, patches: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert release.wait(30)
        alive.extend(ref() is not None for ref in held)
        activations = torch.zeros(1 << 20)
        if patches.shape[0] > 1:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("too many at once")
        return original(self, patches, rows)

    monkeypatch.setattr(type(world.ours), "encode_images", hungry)
    for wide in running(world, blocks=400, prefill_chunk=1000):
        sinks = [Sink() for _ in range(3)]
        for index, sink in enumerate(sinks):
            wide.submit(world.sequence(index, [60], 6, sink))
            if index == 0:
                assert entered.wait(30)  # so that the other two arrive together
        release.set()
        for index, sink in enumerate(sinks):
            assert sink.wait() == world.expected(index, [60], 6)
    assert len(held) == 1, "no step was meant to fail, or more than one"
    assert alive == [False, False]


def test_close_fails_what_is_left_and_later_submissions(world: World) -> None:
    for made in running(world, blocks=100):
        sinks = [Sink() for _ in range(20)]
        for sink in sinks:
            made.submit(world.sequence(0, [70], 10_000, sink))
        made.close()
        late = Sink()
        made.submit(world.sequence(0, [70], 4, late))
        for sink in (*sinks, late):
            with pytest.raises(WorkerDied):
                sink.wait()
        with pytest.raises(WorkerDied):
            made.add_worker("late", 1 << 20)
        assert made.num_blocks == 0 and made.memory_bytes() == 0
        made.close()


def test_a_dead_loop_fails_every_stream_and_says_why(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in running(world, blocks=100):
        causes: list[BaseException] = []
        made.on_death(causes.append)
        sinks = [Sink() for _ in range(5)]
        for sink in sinks:
            made.submit(world.sequence(0, [70], 10_000, sink))

        def broken(now: float) -> None:
            raise SystemError("planted")

        monkeypatch.setattr(made._scheduler, "schedule", broken)
        for sink in sinks:
            with pytest.raises(WorkerDied) as raised:
                sink.wait()
            assert isinstance(raised.value.__cause__, SystemError)
        made._thread.join(10)
        made.on_death(causes.append)
        assert [str(cause) for cause in causes] == ["planted", "planted"]
