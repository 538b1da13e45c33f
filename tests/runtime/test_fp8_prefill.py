"""EngineConfig(prefill="fp8") on its way to the weights: what a runtime and the pool do with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from support.checkpoints import make_checkpoint
from support.runtime import CPU

import llava_engine
from llava_engine import EngineConfig, PoolConfig, WorkerPool
from llava_engine.errors import MemoryExhausted, UnsupportedModel
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model
from llava_engine.quant.fp8 import Fp8Weight
from llava_engine.runtime.runtime import DeviceRuntime

IMITATED = EngineConfig(device="cpu", kernels="reference", prefill="fp8", image_cache_mb=0)


@pytest.fixture
def model(tmp_path: Path) -> LlavaModel:
    make_checkpoint(tmp_path)
    return load_model(tmp_path, device=CPU, dtype=torch.float32)


def test_a_runtime_makes_the_copies_and_counts_them(model: LlavaModel) -> None:
    before = model.nbytes
    runtime = DeviceRuntime(model, device=CPU, config=IMITATED)
    try:
        layers = model.config.text.num_layers
        hidden, wide = model.config.text.hidden_size, model.config.text.intermediate_size
        # Two query heads share a key head: q, k and v have twice hidden outputs, o has hidden.
        assert runtime.memory_bytes() - before == layers * (
            (2 * hidden + hidden) * hidden + 3 * wide * hidden + 4 * (4 * hidden + 2 * wide)
        )
    finally:
        runtime.close()


def test_without_it_there_are_none(model: LlavaModel) -> None:
    before = model.nbytes
    runtime = DeviceRuntime(model, device=CPU, config=EngineConfig(device="cpu"))
    runtime.close()
    assert model.nbytes == before


def test_copies_that_do_not_fit_exhaust_the_memory(
    model: LlavaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(weight: torch.Tensor) -> Fp8Weight:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fp8Weight, "of", full)
    with pytest.raises(MemoryExhausted, match="memory of cpu"):
        DeviceRuntime(model, device=CPU, config=IMITATED)


def test_a_pool_refuses_it_before_it_reads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*arguments: object, **options: object) -> LlavaModel:
        raise AssertionError("weights were read")

    monkeypatch.setattr("llava_engine.pool.backend.load_model", unread)
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", EngineConfig(device="cpu", prefill="fp8"), pool=pool)
        with pytest.raises(UnsupportedModel, match=r'prefill="fp8".*needs a GPU'):
            model.describe_image(Image.new("RGB", (32, 32)), "What is it?").text()
