"""A checkpoint that is damaged while the pool loads it, and mended afterwards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import pytest
from support.checkpoints import make_checkpoint

import llava_engine
from bench.demo_model.scenes import make_scene, render
from llava_engine import EngineConfig, PoolConfig, SpawnFailed, WeightsError, WorkerPool


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_file_that_is_cut_short_while_it_is_read(
    layout: Literal["single", "sharded"], tmp_path: Path
) -> None:
    whole, directory = tmp_path / "whole", tmp_path / "model"
    whole.mkdir()
    make_checkpoint(whole, layout=layout)
    shutil.copytree(whole, directory)
    last = max(directory.glob("*.safetensors"))
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if len(stages) == 1:  # every header was read and believed
            os.truncate(last, last.stat().st_size // 2)

    picture = render(make_scene(77, 0))
    with WorkerPool(PoolConfig(max_workers=1)) as pool:
        config = EngineConfig(device="cpu", kv_cache_mb=16)
        model = llava_engine.get(directory, config, pool=pool, progress=progress)
        with pytest.raises(WeightsError, match="truncated"):
            model.describe_image(picture, "What?", max_new_tokens=2).text()
        assert stages and pool.total_memory_mb() == 0 and not pool.has_workers(model.registry_key)
        shutil.copy(whole / last.name, last)
        stream = model.describe_image(picture, "What?", max_new_tokens=2, ignore_eos=True)
        stream.text()
        assert stream.usage.completion_tokens == 2


def test_a_progress_callback_that_raises_is_named_and_not_to_be_tried_again() -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise ZeroDivisionError("planted")

    with WorkerPool(PoolConfig(max_workers=1)) as pool:
        config = EngineConfig(device="cpu", kv_cache_mb=16)
        model = llava_engine.get("llava-tiny", config, pool=pool, progress=progress)
        with pytest.raises(SpawnFailed, match="the progress callback raised Zero.*: planted") as at:
            model.describe_image(render(make_scene(77, 0)), "What?").text()
        assert not at.value.retryable and isinstance(at.value.__cause__, ZeroDivisionError)
        assert pool.total_memory_mb() == 0
