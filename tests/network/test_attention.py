"""Which rows of a step attend densely, that it is done right, and what each choice means."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from support.kernels import PagedContext, within_twice

from llava_engine.errors import KernelsNotBuilt, UnsupportedModel
from llava_engine.kernels.varlen_attention import (
    plain_varlen_attention,
    torch_flash_varlen_attention,
)
from llava_engine.network.attention import PrefillAttention, prefill_attention
from llava_engine.network.config import RopeConfig, TextConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def prefill(heads: tuple[int, int, int], min_rows: int = 2) -> PrefillAttention:
    return PrefillAttention(
        plain_varlen_attention, min_rows=min_rows, num_kv_heads=heads[1], key_bytes=64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (5, 1, 16)], ids=str)
@pytest.mark.parametrize(
    ("lengths", "dense"),
    [
        ([(9, 9)], 1),
        ([(9, 9), (5, 5)], 2),
        ([(3, 17)], 1),
        ([(1, 13), (1, 1), (7, 21)], 1),
        ([(1, 13), (7, 7), (4, 4)], 2),
        ([(1, 6), (1, 9), (3, 11), (8, 8), (2, 30)], 3),
        ([(3, 11), (1, 6), (8, 8)], 1),
        ([(3, 11), (8, 8), (1, 6)], 0),
        ([(1, 4), (1, 0), (1, 30)], 0),
        ([(1, 0), (0, 3), (6, 7)], 1),
    ],
    ids=str,
)
def test_a_step_is_attention_written_out(
    lengths: list[tuple[int, int]], dense: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    context = PagedContext(lengths, heads, dtype, torch.Generator().manual_seed(3))
    out = context.run_step(prefill(heads), dense=dense)
    within_twice(out, context.expected(dtype), context.expected(torch.float64), floor=1e-6)


def test_short_chunks_stay_paged() -> None:
    heads = (4, 2, 8)
    context = PagedContext(
        [(1, 9), (3, 9), (4, 9), (5, 5)], heads, torch.float32, torch.Generator().manual_seed(3)
    )
    out = context.run_step(prefill(heads, min_rows=4), dense=2)
    torch.testing.assert_close(out, context.expected(torch.float32))


def test_no_more_is_gathered_than_fits() -> None:
    """Whole prompts are read where they are, so the bound is for the others alone."""
    planner = PrefillAttention(
        plain_varlen_attention, min_rows=2, num_kv_heads=1, key_bytes=1 << 20
    )  # 128 MiB are 128 keys

    def dense(*lengths: tuple[int, int]) -> int:
        new, contexts = zip(*lengths, strict=True)
        table = np.zeros((len(new), 4), dtype=np.int32)
        plan = planner.plan(new, contexts, table, 64, CPU)
        return 0 if plan is None else len(new) - plan.num_paged

    assert dense((5, 64), (5, 64)) == 2
    assert dense((5, 64), (5, 64), (5, 5)) == 2
    assert dense((5, 129)) == 0
    assert dense((5, 5), (5, 129)) == 0
    assert dense((200, 200), (200, 200), (9, 9)) == 3


TEXT = TextConfig(
    vocab_size=1,
    hidden_size=256,
    intermediate_size=1,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope=RopeConfig(kind="default", theta=1e4),
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=1,
)


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "device"),
    [
        ("paged", torch.float16, 128, GPU),
        ("auto", torch.float16, 128, GPU),
        ("torch", torch.float32, 128, GPU),
        ("torch", torch.float16, 20, GPU),
        ("torch", torch.bfloat16, 512, GPU),
        ("auto", torch.float16, 128, CPU),
        ("paged", torch.float16, 128, CPU),
    ],
    ids=str,
)
def test_what_is_all_paged(
    name: str, dtype: torch.dtype, head_dim: int, device: torch.device
) -> None:
    config = dataclasses.replace(TEXT, head_dim=head_dim)
    assert prefill_attention(name, config, dtype, device) is None


def test_torch_is_torchs_flash_kernel_on_cuda() -> None:
    """Asked of the plan that it makes of a step; no GPU is needed for that but a stand-in."""
    table = np.zeros((2, 99), dtype=np.int32)
    chosen = prefill_attention("torch", TEXT, torch.float16, GPU)
    assert chosen is not None
    plan = chosen.plan((1, 2), (5, 2), table, 64, CPU)
    assert plan is not None
    assert plan.kernel is torch_flash_varlen_attention
    assert plan.num_paged == 1
    on_cpu = prefill_attention("torch", TEXT, torch.float32, CPU)
    assert on_cpu is not None
    plan = on_cpu.plan([2], [2], table, 64, CPU)
    assert plan is not None and plan.kernel is plain_varlen_attention


def test_flash_attn_is_for_cuda_and_must_be_there() -> None:
    with pytest.raises(UnsupportedModel, match="flash_attn.*CUDA alone.*cpu"):
        prefill_attention("flash_attn", TEXT, torch.float16, CPU)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(KernelsNotBuilt, match="flash-attn"):
            prefill_attention("flash_attn", TEXT, torch.float16, GPU)
