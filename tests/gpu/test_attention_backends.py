"""Prefill by each attention backend on the GPU: against float64, and through the runtime."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU, Sink, World
from support.kernels import PagedContext, within_twice
from support.pictures import random_pictures
from transformers import LlavaForConditionalGeneration

from llava_engine import EngineConfig
from llava_engine.kernels.varlen_attention import (
    VarlenAttention,
    flash_attn_varlen_attention,
    plain_varlen_attention,
    torch_flash_varlen_attention,
)
from llava_engine.network.attention import DensePrefill, PrefillAttention
from llava_engine.network.weights import load_model
from llava_engine.runtime.runtime import DeviceRuntime

pytestmark = NEEDS_GPU

NEEDS_FLASH_ATTN = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed"
)
FLASH = [
    pytest.param(lambda: torch_flash_varlen_attention, id="torch"),
    pytest.param(flash_attn_varlen_attention, id="flash_attn", marks=NEEDS_FLASH_ATTN),
]

HEADS = [(4, 4, 128), (8, 2, 128), (5, 1, 64), (3, 3, 80), (4, 2, 256), (2, 2, 40)]
LENGTHS = {
    "prompt": ([(620, 620)], 1),
    "odd": ([(17, 17), (129, 129), (2, 2)], 3),
    "chunk": ([(512, 1536)], 1),
    "chunks": ([(64, 65), (65, 129), (130, 333), (2, 64), (3, 500)], 5),
    "beside-decoding": ([(1, 13), (1, 700), (1, 0), (70, 210), (33, 33)], 2),
    "beside-short-chunks": ([(1, 301), (70, 210), (1, 2), (0, 3), (40, 200), (9, 9)], 2),
}


# Every new shape costs cuDNN a second: bfloat16, which it treats alike, has two of them.
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        *((heads, torch.float16) for heads in HEADS),
        *((heads, torch.bfloat16) for heads in HEADS[:2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", FLASH)
def test_against_float64(
    kernel: Callable[[], VarlenAttention],
    lengths: str,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator()
    print("seed", generator.seed())
    sequences, dense = LENGTHS[lengths]
    context = PagedContext(sequences, heads, dtype, generator, 64, "cuda")
    context.scale = heads[2] ** -0.5

    def by(chosen: VarlenAttention) -> torch.Tensor:
        prefill = PrefillAttention(
            chosen, min_rows=2, num_kv_heads=heads[1], key_bytes=4 * heads[1] * heads[2]
        )
        return context.run_step(prefill, dense=dense)

    # Plain torch in the same type on the same GPU sets the measure; it is the definition too.
    within_twice(
        by(kernel()), by(plain_varlen_attention), context.expected(torch.float64), floor=1e-6
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, seed=3, text_config={"head_dim": 16})
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float16)
    ours = load_model(directory, device=GPU, dtype=torch.float16)
    pictures = random_pictures(0, 6, ours.config.vision.image_size)
    return World(ours, theirs.eval().to(GPU), pictures)


@pytest.mark.parametrize(
    "name", ["paged", "torch", pytest.param("flash_attn", marks=NEEDS_FLASH_ATTN)]
)
def test_the_runtimes_answers_are_transformers(
    name: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """So those of "paged" and "torch" agree with each other, by the near-tie rule."""
    plans: list[DensePrefill | None] = []
    plan = PrefillAttention.plan

    def watched(self: PrefillAttention, *arguments: Any) -> DensePrefill | None:
        plans.append(plan(self, *arguments))
        return plans[-1]

    monkeypatch.setattr(PrefillAttention, "plan", watched)
    chance = random.Random(4)
    asked = [
        (
            chance.choice([None, 0, 0, 1, 2, 3]),
            [chance.randrange(3, 400) for _ in range(chance.randint(1, 60))],
        )
        for _ in range(32)
    ]
    world.measure(asked)
    config = EngineConfig(device="cuda", attention=name, block_size=16, prefill_chunk=40)
    runtime = DeviceRuntime(world.ours, device=GPU, config=config)
    try:
        runtime.add_worker("one", 400 * runtime.kv_block_bytes)
        sinks = [Sink() for _ in asked]
        for request, sink in zip(asked, sinks, strict=True):
            runtime.submit(world.sequence(*request, sink))
        answers = [sink.wait() for sink in sinks]
    finally:
        runtime.close()
    same = [world.agrees(*request, tokens) for request, tokens in zip(asked, answers, strict=True)]
    record_property("identical", f"{sum(same)} of {len(same)}")
    gathered = [made for made in plans if made is not None and made.cache_rows is not None]
    assert bool(gathered) == (name != "paged")
