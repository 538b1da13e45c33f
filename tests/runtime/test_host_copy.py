"""Arrays reach a device of our own whole, whatever their layout, through few pieces of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.fake_copies import DEVICE, FLAGS, SOURCES, FakeCopies, Helpers, helper_threads
from support.fake_device import compile_native
from support.runtime import CPU, until
from support.uploads import uploaded_arrays

from llava_engine.config import EngineConfig
from llava_engine.network.weights import load_model
from llava_engine.runtime import runtime as runtime_module
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.streams import DeviceStreams

ALIGNMENT = 64
THREADS = 8


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # -Bsymbolic: a CUDA that torch has loaded must not take the fake one's place.
    made = tmp_path_factory.mktemp("native") / "host_copy.so"
    return compile_native(made, SOURCES, *FLAGS, "-shared", "-fPIC", "-Wl,-Bsymbolic")


def places_of(arrays: list[npt.NDArray[Any]]) -> tuple[list[int], int]:
    places, total = [], 0
    for array in arrays:
        places.append(total)
        total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return places, total


def odd_arrays() -> list[npt.NDArray[Any]]:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (90, 150, 3), dtype=np.uint8)
    long = generator.integers(0, 256, (3, 2000, 3), dtype=np.uint8)  # rows longer than a piece
    return [
        picture[:, 20:110],
        generator.integers(-9, 9, (7, 33), dtype=np.int32),
        generator.standard_normal((256, 3)).astype(np.float32),
        picture,
        picture[5:6, 3:4],
        long[:, 1:],
        picture[::-1, :, :],
        picture[:, ::2],
        picture.transpose(1, 0, 2),
        picture[:0],
        np.broadcast_to(picture[0], picture.shape),
        np.array(7, np.int32),
    ]


@pytest.mark.parametrize("piece_bytes", [7, 1000, 1 << 20])
def test_arrays_of_any_layout(library: Path, piece_bytes: int) -> None:
    arrays = odd_arrays()
    for array in arrays:
        array.flags.writeable = False
    with FakeCopies(library, pieces=16, piece_bytes=piece_bytes, threads=THREADS) as device:
        for turn in range(0, len(arrays), 1 if piece_bytes > 7 else 5):
            turned = arrays[turn:] + arrays[:turn]
            for sent in ([], turned[:1], turned[:2], turned):
                places, total = places_of(sent)
                there = torch.full((total + 64,), 77, dtype=torch.uint8)
                device.copies.send(there.data_ptr(), sent, places, device.stream)
                device.finish()
                for array, place in zip(sent, places, strict=True):
                    copy = there[place : place + array.nbytes].numpy()
                    assert copy.tobytes() == array.tobytes()
                assert (there[total:] == 77).all()


@pytest.mark.parametrize("helpers", Helpers)
@pytest.mark.parametrize("threads", range(1, THREADS + 1))
def test_arrays_have_been_read_when_the_call_returns(
    library: Path, threads: int, helpers: Helpers
) -> None:
    """One upload after the other, so that pieces are used again before the device has read them;
    by threads that are there from the first one on, or late, or slow."""
    generator = np.random.default_rng(1)
    with FakeCopies(
        library, pieces=16, piece_bytes=1000, threads=threads, helpers=helpers
    ) as device:
        sent = []
        for turn in range(20):
            array = generator.integers(0, 256, (1 + turn * 7 % 41, 300, 3), dtype=np.uint8)
            there = torch.empty(array[:, 7:].nbytes, dtype=torch.uint8)
            sent.append((there, array[:, 7:].tobytes()))
            device.copies.send(there.data_ptr(), [array[:, 7:]], [0], device.stream)
            array[:] = 0
            if turn == 10 and helpers is Helpers.HELD:  # they have missed what came so far
                device.set_helpers(Helpers.PROMPT)
        assert 0 < device.done < device.queued
        device.finish()
        for there, expected in sent:
            assert there.numpy().tobytes() == expected


def test_pieces_that_lie_behind_each_other_are_one_copy(library: Path) -> None:
    """At least those that a slow thread kept from being queued. An upload takes long enough for it
    to wake, also where others keep the cores busy."""
    with FakeCopies(library, pieces=16, piece_bytes=100, threads=2, helpers=Helpers.SLOW) as device:
        array, there = np.ones(400_000, np.uint8), torch.zeros(400_000, dtype=torch.uint8)
        for turn in range(1, 200):
            device.copies.send(there.data_ptr(), [array], [0], device.stream)
            if device.queued < 4000 * turn:
                break
        assert device.queued < 4000 * turn
        device.finish()
        assert (there == 1).all()


def test_nobody_waits_but_for_the_copy_that_a_piece_holds(library: Path) -> None:
    with FakeCopies(library, pieces=4, piece_bytes=100) as device:
        array, there = np.ones(400, np.uint8), torch.empty(400, dtype=torch.uint8)
        device.copies.send(there.data_ptr(), [array[:100]], [0], device.stream)
        device.copies.send(there.data_ptr(), [array[:300]], [0], device.stream)
        assert (device.queued, device.done) == (4, 0)
        device.copies.send(there.data_ptr(), [array[:200]], [0], device.stream)
        assert (device.queued, device.done) == (6, 2)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_device_that_fails_ends_it(library: Path, after: int) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100, threads=THREADS) as device:
        array, there = np.ones(40_000, np.uint8), torch.zeros(40_000, dtype=torch.uint8)
        device.refuse(after)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="an illegal memory access"):
                device.copies.send(there.data_ptr(), [array], [0], device.stream)
            assert device.queued == after
        device.refuse(-1)  # it works again, and so does the copier
        device.copies.send(there.data_ptr(), [array], [0], device.stream)
        device.finish()
        assert (there == 1).all()


def test_threads_copy_to_the_device_that_is_meant(library: Path) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100) as device:
        array, there = np.ones(40_000, np.uint8), torch.empty(40_000, dtype=torch.uint8)
        copies = device.copies_to(DEVICE + 1, THREADS)
        with pytest.raises(RuntimeError, match=r"\(101\)"):
            copies.send(there.data_ptr(), [array], [0], device.stream)
        copies.close()
        assert device.queued == 0


def test_threads_are_kept_from_one_upload_to_the_next(library: Path) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100, threads=THREADS) as device:
        until(lambda: helper_threads() == THREADS - 1)
        array, there = np.ones(4000, np.uint8), torch.empty(4000, dtype=torch.uint8)
        for _ in range(50):
            device.copies.send(there.data_ptr(), [array], [0], device.stream)
            assert helper_threads() == THREADS - 1
    until(lambda: helper_threads() == 0)


def test_no_more_threads_than_pieces(library: Path) -> None:
    with FakeCopies(library, pieces=3, piece_bytes=100, threads=THREADS):
        until(lambda: helper_threads() == 2)


@pytest.mark.parametrize("cores, threads", [(1, 1), (2, 1), (3, 1), (6, 3), (16, 8), (64, 8)])
def test_half_of_the_cores_copy(
    library: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    with FakeCopies(library, pieces=16, piece_bytes=100, threads=None):
        until(lambda: helper_threads() == threads - 1)


def test_close_ends_the_threads_and_may_be_called_again(library: Path) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100, threads=THREADS) as device:
        until(lambda: helper_threads() == THREADS - 1)
        for _ in range(2):
            device.copies.close()
            until(lambda: helper_threads() == 0)
        array, there = np.ones(100, np.uint8), torch.empty(100, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=r"\(400\)"):
            device.copies.send(there.data_ptr(), [array], [0], device.stream)


def test_a_forgotten_one_ends_its_threads(library: Path) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100) as device:
        copies = device.copies_to(DEVICE, THREADS)
        until(lambda: helper_threads() == THREADS - 1)
        del copies
        until(lambda: helper_threads() == 0)


def test_streams_end_the_threads_of_their_uploads(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=1000, threads=THREADS) as device:
        streams, stream = DeviceStreams(CPU), device.stream
        streams._copies = device.copies
        current = "_cuda_getCurrentRawStream"  # of a build with CUDA
        monkeypatch.setattr(torch._C, current, lambda device: stream, raising=False)
        arrays = [array for array in odd_arrays() if array.size]
        arrays += [np.arange(9), np.arange(7)[::3]]
        copies = uploaded_arrays(streams, arrays)
        device.finish()
        for copy, array in zip(copies, arrays, strict=True):
            np.testing.assert_array_equal(copy.numpy(), array, strict=True)
        until(lambda: helper_threads() == THREADS - 1)
        streams.close()
        until(lambda: helper_threads() == 0)
        streams.close()


def test_a_runtime_closes_its_streams_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its loop has ended, or at once if it cannot be made."""
    closed = []

    class CountedStreams(DeviceStreams):
        def close(self) -> None:
            closed.append(self)
            super().close()

    monkeypatch.setattr(runtime_module, "DeviceStreams", CountedStreams)
    make_checkpoint(tmp_path)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    config = EngineConfig(device="cpu")
    runtime = DeviceRuntime(model, device=CPU, config=config)
    assert not closed
    runtime.close()
    runtime.close()
    assert closed == [runtime._streams]

    def failing(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime_module, "Steps", failing)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceRuntime(model, device=CPU, config=config)
    assert len(closed) == 2
