"""Reading: the bytes that the files hold, whatever the types and places; nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from llava_engine.errors import MemoryExhausted, WeightsError
from llava_engine.network import tensor_reader, weights
from llava_engine.network.llava import LlavaModel
from llava_engine.network.safetensors_file import SafetensorsFile
from llava_engine.network.tensor_reader import DTYPES, READERS, read_tensors
from llava_engine.network.weights import load_model

CPU = torch.device("cpu")
SINGLE = "model.safetensors"


def filled(path: Path, places: dict[str, torch.Tensor]) -> int:
    """Read `places` from `path`; returns the sum of the bytes told."""
    told: list[int] = []
    with SafetensorsFile(path) as file:
        read_tensors(
            [(file.tensors[name], place) for name, place in places.items()], CPU, told.append
        )
    return sum(told)


@pytest.mark.parametrize("piece_bytes", [1, 96, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
def test_every_place_gets_its_tensor_and_no_more(
    stored: torch.dtype,
    dtype: torch.dtype,
    piece_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", piece_bytes)
    shapes = {"first": (5, 7), "second": (3, 7), "turned": (6, 4), "wide": (4, 5), "one": ()}
    content = {name: torch.randn(shape).mul(100).to(stored) for name, shape in shapes.items()}
    content["empty"] = torch.empty(0, 7, dtype=stored)
    save_file(content, tmp_path / SINGLE)
    fused = torch.full((10, 7), 0.5, dtype=dtype)
    spaced = torch.full((4, 10), 0.5, dtype=dtype)
    places = {
        "first": fused[1:6],
        "second": fused[6:9],
        "turned": torch.empty(4, 6, dtype=dtype).T,
        "wide": spaced[:, ::2],
        "one": torch.empty((), dtype=dtype),
        "empty": torch.empty(0, 7, dtype=dtype),
    }
    size = sum(tensor.nbytes for tensor in content.values())
    assert filled(tmp_path / SINGLE, places) == size
    for name, expected in load_file(tmp_path / SINGLE).items():
        assert torch.equal(places[name], expected.to(dtype)), name
    rest = torch.cat((fused[0], fused[9], spaced[:, 1::2].flatten()))
    assert torch.equal(rest, torch.full_like(rest, 0.5))


def test_bits_are_kept_where_nothing_is_converted(tmp_path: Path) -> None:
    """Every pattern of 16 bits: all NaNs, infinities and subnormal numbers too."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    save_file({"all": patterns.view(torch.bfloat16)}, tmp_path / SINGLE)
    place = torch.zeros(1 << 16, dtype=torch.bfloat16)
    filled(tmp_path / SINGLE, {"all": place})
    assert torch.equal(place.view(torch.int16), patterns)


def test_tensors_made_in_inference_mode(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / SINGLE)
    with torch.inference_mode():
        same, other = torch.zeros(3), torch.zeros(3, dtype=torch.float16)
    for place in (same, other):
        filled(tmp_path / SINGLE, {"a": place})
        assert place.tolist() == [1, 1, 1]


def test_nothing_to_read(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0)}, tmp_path / SINGLE)
    assert filled(tmp_path / SINGLE, {"a": torch.empty(0)}) == 0


def test_reads_are_under_way_in_all_threads_at_once_and_told_in_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.randn(READERS, 1000)
    save_file({"a": content}, tmp_path / SINGLE)
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 4000)
    preadv, together = os.preadv, threading.Barrier(READERS)

    def meet(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        together.wait(60)
        return preadv(descriptor, buffers, offset)

    place = torch.empty(READERS, 1000)
    tellers = []
    with SafetensorsFile(tmp_path / SINGLE) as file:
        monkeypatch.setattr(os, "preadv", meet)
        read_tensors(
            [(file.tensors["a"], place)], CPU, lambda _: tellers.append(threading.get_ident())
        )
    assert torch.equal(place, content)
    assert tellers == [threading.get_ident()] * READERS


def test_reads_that_give_less_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.randn(1000)
    save_file({"a": content}, tmp_path / SINGLE)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:33]], at))
    place = torch.empty(1000)
    filled(tmp_path / SINGLE, {"a": place})
    assert torch.equal(place, content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_memory_holds_the_weights_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Neither the file nor a second copy is in the process's memory, at any time."""
    size = 256 << 20
    with (tmp_path / SINGLE).open("wb") as file:
        header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (size // 4, size)
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    process = psutil.Process()
    before = process.memory_info().rss
    place = torch.empty(size // 4, dtype=dtype)
    peaks: list[int] = []
    with SafetensorsFile(tmp_path / SINGLE) as stored:
        read_tensors(
            [(stored.tensors["a"], place)],
            CPU,
            lambda _: peaks.append(process.memory_info().rss),
        )
    assert max(peaks) - before < place.nbytes + 3 * tensor_reader.PIECE_BYTES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(root / "single", layout="single")
    make_checkpoint(root / "sharded", layout="sharded")
    return root


@pytest.fixture(params=["single", "sharded"])
def directory(made: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(made / request.param, tmp_path / "model")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[LlavaModel]]]:
    """Every model that is made. They must go without the cycle collector: it may come late."""
    found: list[weakref.ref[LlavaModel]] = []

    class Watched(LlavaModel):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            found.append(weakref.ref(self))

    monkeypatch.setattr(weights, "LlavaModel", Watched)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def open_things() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def cut(directory: Path) -> Callable[[str, int, int], None]:
    """A progress callback that cuts the last shard short as soon as all headers were read."""
    file = max(directory.glob("*.safetensors"))

    def progress(stage: str, done: int, total: int) -> None:
        if done == 0:
            os.truncate(file, file.stat().st_size // 2)

    return progress


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_file_that_is_cut_short_while_it_is_read(
    dtype: torch.dtype, directory: Path, models: list[weakref.ref[LlavaModel]]
) -> None:
    before = open_things()
    with pytest.raises(WeightsError, match="truncated") as raised:
        load_model(directory, device=CPU, dtype=dtype, progress=cut(directory))
    assert max(directory.glob("*.safetensors")).name in str(raised.value)
    assert str(directory.parent) not in str(raised.value)
    assert open_things() == before
    assert len(models) == 2 and not any(model() for model in models)


@pytest.mark.parametrize("kind", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["reader", "progress"])
def test_whatever_fails_nothing_is_left(
    place: str,
    kind: type[BaseException],
    directory: Path,
    models: list[weakref.ref[LlavaModel]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preadv = os.preadv
    failure = kind(errno.EIO, "Input/output error", str(directory))
    armed = threading.Event()

    def fail(*args: object) -> int:
        if armed.is_set() and threading.current_thread().name.startswith("llava-load"):
            raise failure
        return preadv(*args)  # type: ignore[arg-type]

    def progress(stage: str, done: int, total: int) -> None:
        armed.set()
        if place == "progress" and done:
            raise failure

    if place == "reader":
        monkeypatch.setattr(os, "preadv", fail)
    expected = WeightsError if (place, kind) == ("reader", OSError) else kind
    before = open_things()
    with pytest.raises(expected) as raised:
        load_model(directory, device=CPU, dtype=torch.float32, progress=progress)
    if expected is WeightsError:
        assert raised.value.__cause__ is failure
        assert str(directory) not in str(raised.value)
    assert open_things() == before
    assert len(models) == 2 and not any(model() for model in models)


def test_files_are_closed_and_threads_ended_after_a_load(directory: Path) -> None:
    before = open_things()
    model = load_model(directory, device=CPU, dtype=torch.float16)
    assert open_things() == before
    assert model.nbytes


def test_a_reader_that_gets_no_buffer(
    directory: Path, models: list[weakref.ref[LlavaModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's words for it on the CPU, and CUDA's number for pinned memory."""

    class PinningFails(RuntimeError):
        error_code = 2

    for error in (
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"),
        PinningFails("CUDA error: out of memory"),
    ):

        def no_buffer(nbytes: int, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(tensor_reader, "_HostReader", no_buffer)
        with pytest.raises(MemoryExhausted, match="cpu"):
            load_model(directory, device=CPU, dtype=torch.float16)
    assert not any(model() for model in models)


def test_steps_are_used_in_turn_and_every_second_may_have_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of uneven sizes, one of them empty; what a step found is what its tensors hold."""
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 64)
    sizes = [100, 3, 0, 57, 200, 1, 90]
    content = {str(index): torch.randn(size) for index, size in enumerate(sizes)}
    save_file(content, tmp_path / SINGLE)
    staging = torch.empty(2, max(sizes))
    found: list[torch.Tensor] = []
    told: list[int] = []

    def use(step: int) -> None:
        assert step == len(found)
        time.sleep(0.01)  # long enough for a reader that does not wait
        found.append(staging[step % 2, : sizes[step]].clone())

    with SafetensorsFile(tmp_path / SINGLE) as file:
        tensor_reader.read_in_turn(
            [
                [(file.tensors[str(step)], staging[step % 2, :size])]
                for step, size in enumerate(sizes)
            ],
            CPU,
            told.append,
            use,
        )
    assert sum(told) == 4 * sum(sizes)
    for step, expected in enumerate(content.values()):
        assert torch.equal(found[step], expected)


def test_the_next_step_is_read_while_one_is_used(tmp_path: Path) -> None:
    content = {"a": torch.randn(8), "b": torch.randn(8)}
    save_file(content, tmp_path / SINGLE)
    places = {name: torch.zeros(8) for name in content}

    def use(step: int) -> None:
        until = time.monotonic() + 60
        while step == 0 and not torch.equal(places["b"], content["b"]):
            assert time.monotonic() < until, "nothing is read meanwhile"
            time.sleep(0.001)

    with SafetensorsFile(tmp_path / SINGLE) as file:
        tensor_reader.read_in_turn(
            [[(file.tensors[name], place)] for name, place in places.items()],
            CPU,
            lambda _: None,
            use,
        )


def test_a_step_that_cannot_be_used_ends_the_reading(tmp_path: Path) -> None:
    save_file({"a": torch.randn(8), "b": torch.randn(8), "c": torch.randn(8)}, tmp_path / SINGLE)
    before = open_things()

    def use(step: int) -> None:
        raise ValueError(step)

    with (
        pytest.raises(ValueError, match="0"),
        SafetensorsFile(tmp_path / SINGLE) as file,
    ):
        tensor_reader.read_in_turn(
            [[(file.tensors[name], torch.empty(8))] for name in "abc"], CPU, lambda _: None, use
        )
    assert open_things() == before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_bytes_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Into a place of another shape, too: codes are stored as one column."""
    content = torch.arange(-128, 128).to(dtype).view(256, 1)
    save_file({"a": content}, tmp_path / SINGLE)
    place = torch.zeros(4, 64, dtype=dtype)
    filled(tmp_path / SINGLE, {"a": place})
    assert torch.equal(place.view(256, 1), content)
