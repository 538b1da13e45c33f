"""Arrays reach a device of our own whole, whatever their layout, through few pieces of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.fake_copies import DEVICE, SOURCES, FakeCopies
from support.fake_device import compile_native

from llava_engine.runtime import host_copy

ALIGNMENT = 64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # -Bsymbolic: a CUDA that torch has loaded must not take the fake one's place.
    made = tmp_path_factory.mktemp("native") / "host_copy.so"
    return compile_native(made, SOURCES, "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there can be, also for little and on a small machine."""
    monkeypatch.setattr(host_copy, "_BYTES_A_THREAD", 1500)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


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


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_arrays_of_any_layout(threads: None, library: Path, piece_bytes: int) -> None:
    arrays = odd_arrays()
    for array in arrays:
        array.flags.writeable = False
    with FakeCopies(library, pieces=16, piece_bytes=piece_bytes) as device:
        for turn in range(0, len(arrays), 1 if piece_bytes > 1 else 5):
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


def test_arrays_have_been_read_when_the_call_returns(threads: None, library: Path) -> None:
    """One upload after the other, so that pieces are used again before the device has read them."""
    generator = np.random.default_rng(1)
    with FakeCopies(library, pieces=16, piece_bytes=1000) as device:
        sent = []
        for _ in range(20):
            array = generator.integers(0, 256, (41, 300, 3), dtype=np.uint8)
            there = torch.empty(array[:, 7:].nbytes, dtype=torch.uint8)
            sent.append((there, array[:, 7:].tobytes()))
            device.copies.send(there.data_ptr(), [array[:, 7:]], [0], device.stream)
            array[:] = 0
        assert 0 < device.done < device.queued
        device.finish()
        for there, expected in sent:
            assert there.numpy().tobytes() == expected


def test_nobody_waits_but_for_the_copy_that_a_piece_holds(library: Path) -> None:
    with FakeCopies(library, pieces=4, piece_bytes=100) as device:
        array, there = np.ones(400, np.uint8), torch.empty(400, dtype=torch.uint8)
        device.copies.send(there.data_ptr(), [array], [0], device.stream)
        assert (device.queued, device.done) == (4, 0)
        device.copies.send(there.data_ptr(), [array[:200]], [0], device.stream)
        assert (device.queued, device.done) == (6, 2)


@pytest.mark.parametrize("after", [0, 1, 30])
def test_a_device_that_fails_ends_it(threads: None, library: Path, after: int) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100) as device:
        device.refuse(after)
        array, there = np.ones(40_000, np.uint8), torch.empty(40_000, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="an illegal memory access"):
            device.copies.send(there.data_ptr(), [array], [0], device.stream)
        assert device.queued == after


def test_threads_copy_to_the_device_that_is_meant(threads: None, library: Path) -> None:
    with FakeCopies(library, pieces=16, piece_bytes=100) as device:
        array, there = np.ones(40_000, np.uint8), torch.empty(40_000, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=r"\(101\)"):
            device.copies_to(DEVICE + 1).send(there.data_ptr(), [array], [0], device.stream)
