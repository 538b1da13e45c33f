"""What the engine takes on a CPU, with llava-tiny: bench/'s questions at a size for any machine.

A question a case: loading, a picture's way to the model, the vision tower, first tokens, decoding
by batch, serving, and a scheduler's step. It is pytest-benchmark that measures, compares runs
(--benchmark-compare) and writes JSON:

    make bench          or          python -m pytest bench/test_cpu.py [--benchmark-json PATH]
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

import llava_engine
from bench.scheduler import BATCH, PROMPT, sequence
from llava_engine.cli.bench.loops import closed_loop
from llava_engine.cli.bench.workload import Workload, noise
from llava_engine.demo import model_dir
from llava_engine.image.picture_cache import PictureCache
from llava_engine.image.preprocess import ImageProcessorConfig
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.norm import rms_norm
from llava_engine.kernels.preprocess import DecodedPicture
from llava_engine.network.weights import load_model
from llava_engine.runtime.kv_cache import BlockPool
from llava_engine.runtime.picture_encoder import PictureEncoder
from llava_engine.runtime.scheduler import Scheduler
from llava_engine.runtime.streams import DeviceStreams

CPU = torch.device("cpu")
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def model() -> Iterator[llava_engine.VisionModel]:
    pool = llava_engine.WorkerPool(llava_engine.PoolConfig())
    config = llava_engine.EngineConfig(device="cpu", kv_cache_mb=256)
    yield llava_engine.get("llava-tiny", config, pool=pool)
    pool.shutdown(0)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    """Of pictures that no request had before."""
    return itertools.count()


def work(model: llava_engine.VisionModel, new_tokens: int) -> Workload:
    return Workload(model, noise((112, 112), seed=0), "Describe the picture.", new_tokens)


def pictures(size: tuple[int, int], count: int) -> list[bytes]:
    files = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(noise(size, seed=1)(number)).save(file, "jpeg", quality=90)
        files.append(file.getvalue())
    return files


def prepared(files: list[bytes]) -> list[DecodedPicture]:
    """Pictures as the vision tower's preprocessing takes them."""
    processor = ImageProcessorConfig.from_directory(model_dir())
    cache = PictureCache(
        processor, max_bytes=1 << 30, max_pixels=1 << 30, capacity=0, resample=True
    )
    return [cache.prepare(file).pixels for file in files]


def test_load(benchmark):
    """The checkpoint from the page cache to a model in float32."""
    benchmark(load_model, model_dir(), device=CPU, dtype=torch.float32)


def test_picture(benchmark):
    """A JPEG of 640 x 480: decoded, resized, cropped."""
    files = itertools.cycle(pictures((480, 640), 8))
    benchmark(lambda: prepared([next(files)]))


@pytest.mark.parametrize("count", [1, 4])
def test_vision(benchmark, count):
    """Tower and projector for so many pictures."""
    encode = PictureEncoder(
        load_model(model_dir(), device=CPU, dtype=torch.float32),
        DeviceStreams(CPU),
        captures=False,
    )
    given = prepared(pictures((112, 112), count))
    with torch.inference_mode():
        benchmark(encode, given)


@pytest.mark.parametrize("rows", [1, 64, 620])
@pytest.mark.parametrize("op", ["rms_norm", "silu_mul"])
def test_reference(benchmark, op, rows):
    """The references of two kernels at LLaVA-1.5-7B's width."""
    x = torch.randn(rows, 4096 if op == "rms_norm" else 2 * 11008)
    if op == "rms_norm":
        out, weight = torch.empty_like(x), torch.ones(4096)
        benchmark(rms_norm, out, x, weight, 1e-5)
    else:
        benchmark(silu_mul, torch.empty(rows, 11008), x)


@pytest.mark.parametrize("seen", [False, True], ids=["new", "seen"])
def test_first_token(benchmark, model, numbers, seen):
    """From the call to the one token: of a new picture, and of one seen with the same question."""
    ask = work(model, 1)

    def setup():
        number = 0 if seen else 1 + next(numbers)
        return (ask.ask(number, 1),), {}

    benchmark.pedantic(lambda asked: asked(0).text(), setup=setup, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("at_once", [1, 4, 8])
def test_serving(benchmark, model, numbers, at_once):
    """So many requests at once, of 16 tokens each, to the last one's end."""

    def setup():
        first = 1_000 + at_once * next(numbers)
        return (work(model, NEW_TOKENS).ask(first, at_once), at_once, at_once), {}

    records, _ = benchmark.pedantic(closed_loop, setup=setup, rounds=8, warmup_rounds=1)
    assert [record.error for record in records] == [None] * at_once
    assert all(record.output_tokens == NEW_TOKENS for record in records)


@pytest.mark.parametrize("waiting", [0, 1000])
def test_scheduler_step(benchmark, waiting):
    """64 sequences decode while so many wait; no model."""
    steps = 200
    blocks = BATCH * (PROMPT + 4 * steps + 2 * BATCH) // 64 + BATCH
    plan = Scheduler(
        BlockPool(blocks, 64), max_batch=BATCH, prefill_chunk=1 << 20, max_model_len=4096
    )
    for index in range(BATCH + waiting):
        plan.add(sequence(index))

    def step() -> None:
        for entry in plan.schedule(0.0):
            plan.complete(entry, 5)

    benchmark.pedantic(step, rounds=steps, warmup_rounds=5)
    assert len(plan.running) == BATCH and plan.num_waiting == waiting
