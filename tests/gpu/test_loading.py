"""Weights to a GPU: those that the CPU gets, when they are needed; nothing kept of a failure.

Copies are held back by kernels that spin, so that it shows where something does not wait for them.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU

import llava_engine
from bench.demo_model.scenes import make_scene, render
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.errors import WeightsError
from llava_engine.network import tensor_reader
from llava_engine.network.safetensors_file import SafetensorsFile
from llava_engine.network.tensor_reader import DTYPES, READERS, read_tensors
from llava_engine.network.weights import load_model

pytestmark = NEEDS_GPU

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
TYPES = [torch.float16, torch.bfloat16, torch.float32]
SPIN_CYCLES = 400_000_000  # about a quarter of a second


def read(path: Path, places: dict[str, torch.Tensor]) -> None:
    with SafetensorsFile(path) as file:
        read_tensors(
            [(file.tensors[name], place) for name, place in places.items()], GPU, lambda _: None
        )


def cut(directory: Path) -> Callable[[str, int, int], None]:
    """A progress callback that halves the last shard once the first bytes were read."""
    file = max(directory.glob("*.safetensors"))
    size = file.stat().st_size // 2

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "load" and file.stat().st_size > size:
            os.truncate(file, size)

    return progress


def shard(directory: Path) -> None:
    """Make two files and an index of a checkpoint in one."""
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    weight_map: dict[str, str] = {}
    for number in range(2):
        part = dict(sorted(tensors.items())[number::2])
        save_file(part, directory / f"model-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


# Smaller pieces take seconds, and are the CPU's tests' matter.
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 24])
@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("stored", TYPES, ids=str)
def test_the_gpu_gets_what_the_cpu_gets(
    stored: torch.dtype,
    dtype: torch.dtype,
    layout: str,
    piece_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", piece_bytes)
    make_checkpoint(tmp_path, layout=layout)  # type: ignore[arg-type]
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    ours = dict(load_model(tmp_path, device=GPU, dtype=dtype).slots())
    for name, expected in load_model(tmp_path, device=CPU, dtype=dtype).slots():
        assert torch.equal(ours[name].cpu(), expected), name


@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
def test_a_buffer_is_filled_anew_only_when_its_copy_is_made(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy is behind a kernel that spins, and there are ten times as many as buffers."""
    stream_after_current = tensor_reader._stream_after_current

    def held_back(device: torch.device) -> torch.cuda.Stream:
        stream = stream_after_current(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN_CYCLES)
        return stream

    content = torch.randn(20 * READERS, 1 << 15).to(stored)
    save_file({"a": content}, tmp_path / SINGLE)
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", content[0].nbytes)
    monkeypatch.setattr(tensor_reader, "_stream_after_current", held_back)
    places = torch.empty_like(content, dtype=torch.float16, device=GPU)
    read(tmp_path / SINGLE, {"a": places})
    # On a stream that waits for nobody: the copies must have been made.
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(places.cpu(), content.half())


def test_work_of_before_does_not_write_over_what_was_read(tmp_path: Path) -> None:
    content = torch.randn(1 << 20)
    save_file({"a": content}, tmp_path / SINGLE)
    place = torch.empty_like(content, device=GPU)
    torch.cuda._sleep(SPIN_CYCLES)
    place.fill_(1)
    read(tmp_path / SINGLE, {"a": place})
    assert torch.equal(place.cpu(), content)


def test_places_that_are_no_whole_tensors(tmp_path: Path) -> None:
    content = {
        "turned": torch.randn(64, 48),
        "slice": torch.randn(100, 8),
        "one": torch.tensor(3.0),
    }
    save_file(content, tmp_path / SINGLE)
    for dtype in TYPES:
        fused = torch.full((102, 8), 0.5, dtype=dtype, device=GPU)
        places = {
            "turned": torch.empty(48, 64, dtype=dtype, device=GPU).T,
            "slice": fused[1:101],
            "one": torch.empty((), dtype=dtype, device=GPU),
        }
        read(tmp_path / SINGLE, places)
        for name, place in places.items():
            assert torch.equal(place.cpu(), content[name].to(dtype)), name
        assert torch.equal(fused[[0, 101]], torch.full_like(fused[:2], 0.5))


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32."""
    made: Path = tmp_path_factory.mktemp("wide")
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    make_checkpoint(made, text_config=text)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_given_back(
    fails: bool,
    dtype: torch.dtype,
    half_a_gigabyte: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The device's and the pinned; after a failure even while its exception is kept."""
    directory = half_a_gigabyte
    if fails:  # the file is cut
        directory = shutil.copytree(half_a_gigabyte, tmp_path / "model")
    load_model(directory, device=GPU, dtype=dtype)  # the context and its lazy parts stay for good
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    reserved, free = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    gc.disable()
    try:
        if fails:
            with pytest.raises(WeightsError, match="truncated") as raised:
                load_model(directory, device=GPU, dtype=dtype, progress=cut(directory))
            assert raised.value.__traceback__ is not None
        else:
            model = load_model(directory, device=GPU, dtype=dtype)
            taken = torch.cuda.memory_reserved() - reserved
            record_property("taken", f"{taken} reserved for {model.nbytes}")
            assert taken < model.nbytes * 1.1 + (20 << 20)  # the allocator's segments
            del model
            torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == pinned
        assert torch.cuda.mem_get_info()[0] >= free - (4 << 20)
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_the_pool_recovers_from_a_file_that_was_cut_short(
    layout: Literal["single", "sharded"], tmp_path: Path
) -> None:
    """The device's memory is back before the next try, although the failure is kept."""
    tiny = Path(llava_engine.__file__).parent / "demo" / "llava-tiny"
    whole, directory = shutil.copytree(tiny, tmp_path / "whole"), tmp_path / "model"
    if layout == "sharded":
        shard(whole)
    shutil.copytree(whole, directory)
    picture = render(make_scene(77, 0))
    cutting = cut(directory)
    armed = [True]

    def progress(stage: str, done: int, total: int) -> None:
        if armed:
            cutting(stage, done, total)

    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    reserved = torch.cuda.memory_reserved()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    with WorkerPool(PoolConfig(max_workers=1)) as pool:
        config = EngineConfig(device="cuda:0", kv_cache_mb=64)
        model = llava_engine.get(directory, config, pool=pool, progress=progress)
        with pytest.raises(WeightsError, match="truncated") as failure:
            model.describe_image(picture, "Describe the picture.").text()
        assert failure.value.__traceback__ is not None
        assert pool.total_memory_mb() == 0
        assert torch.cuda.memory_reserved() == reserved
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == pinned
        armed.clear()
        for file in whole.glob("*.safetensors"):
            shutil.copy(file, directory)
        assert model.describe_image(picture, "Describe the picture.").text()


COLD = """
import json, sys
import llava_engine
import llava_engine.cli
from llava_engine.demo import picture_path

model = llava_engine.get("llava-tiny", llava_engine.EngineConfig())
text = model.describe_image(picture_path(), "Describe the picture.").text()
(model,) = llava_engine.vision_pool().health()["models"].values()
devices = [worker["device"] for worker in model["workers"]]
print(json.dumps([text, devices, model["cold_start"], sorted(sys.modules)]))
sys.exit(llava_engine.cli.main(["describe"]))
"""


def ran(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_cold_start_of_a_process(record_property: Callable[[str, object], None]) -> None:
    """It is on the GPU unasked, every stage is told, and torch's compiler stays out of it. The
    command, which asks the same model afterwards, says that it ran on the GPU."""
    done = ran("-c", COLD)
    told, _, said = done.stdout.partition("\n")
    text, devices, stages, imported = json.loads(told)
    record_property("cold_start", json.dumps({k: round(v, 3) for k, v in stages.items()}))
    assert text and devices and all(device.startswith("cuda:") for device in devices)
    assert {"imports", "context", "library", "weights", "kv cache, graphs", "total"} <= set(stages)
    assert all(0 <= seconds <= stages["total"] for seconds in stages.values())
    needless = {"torch._dynamo", "torch._inductor", "sympy", "httpx", "huggingface_hub"}
    assert needless & set(imported) == set()
    name = torch.cuda.get_device_name()
    assert f"({name}), compiled kernels" in done.stderr and "cuda:" in done.stderr
    assert len(said.split()) > 2


def test_a_gpu_that_is_not_used_is_named(tmp_path: Path) -> None:
    """The package without its library, as where nobody could build it."""
    package = Path(llava_engine.__file__).parent
    shutil.copytree(
        package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    others = filter(None, [os.environ.get("PYTHONPATH")])
    done = ran(
        *("-m", "llava_engine.cli", "describe", "--max-new-tokens", "2"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *others])},
    )
    assert done.stderr.startswith("llava-engine: ran on the CPU; ")
    assert "is not used: the package's CUDA library is not there" in done.stderr
