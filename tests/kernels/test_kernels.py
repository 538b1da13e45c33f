"""Each op's reference against transformers' modules or torch in float64, and its schema."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.kernels import PagedContext, poisoned, within_twice
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.norm import add_rms_norm, rms_norm
from llava_engine.kernels.rope_kv import rope_append

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4096)], ids=str)
def test_rms_norm_is_llamas(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    norm = LlamaRMSNorm(shape[1], eps=1e-3).to(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    with torch.inference_mode():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        expected = norm(x)
        out = poisoned(*shape, dtype=dtype)
        rms_norm(out, x, norm.weight, 1e-3)
        assert torch.equal(out, expected)
        rms_norm(x, x, norm.weight, 1e-3)
        assert torch.equal(x, expected), "in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_an_addition_and_llamas_norm(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    norm = LlamaRMSNorm(33, eps=1e-6).to(dtype)
    x, residual = torch.randn(2, 6, 33, generator=generator).to(dtype)
    with torch.inference_mode():
        total = residual + x
        expected = norm(total)
        add_rms_norm(x, residual, x, norm.weight, 1e-6)
        assert torch.equal(residual, total)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1000)], ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    gate, up = (torch.randn(shape, generator=generator).to(dtype) * 4 for _ in range(2))
    out = poisoned(*shape, dtype=dtype)
    silu_mul(out, torch.cat((gate, up), dim=1))
    wide = gate.double()
    within_twice(out, F.silu(gate) * up, wide / (1 + (-wide).exp()) * up.double(), 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (3, 1, 2)], ids=str)
def test_rope_append(
    heads: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Rotation as in transformers; keys and values in their slots, all else left alone."""
    q_heads, kv_heads, dim = heads
    tokens, blocks, block_size, length = 7, 5, 3, 90
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=dim * q_heads, num_attention_heads=q_heads, head_dim=dim)
    )
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    cos_sin = torch.cat((cos[0, :, : dim // 2], sin[0, :, : dim // 2]), dim=-1)
    qkv = torch.randn(tokens, q_heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    q, k, v = qkv.clone().split((q_heads, kv_heads, kv_heads), dim=1)  # slices of one matrix
    positions = torch.tensor([0, 1, 89, 5, 6, 7, 40])
    slots = torch.tensor([4, 5, 0, -1, 14, 7, -1])
    k_cache = poisoned(blocks, kv_heads, block_size, dim, dtype=dtype)
    v_cache = k_cache.clone()
    rope_append(q, k, v, cos_sin, positions, slots, k_cache, v_cache)

    def rotated(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By transformers: in x's own type, and in float64."""
        c, s = cos[:, positions], sin[:, positions]
        rows = x.transpose(0, 1)[None]
        plain, _ = apply_rotary_pos_emb(rows, rows, c.to(dtype), s.to(dtype))
        truth, _ = apply_rotary_pos_emb(rows.double(), rows.double(), c.double(), s.double())
        return plain[0].transpose(0, 1), truth[0].transpose(0, 1)

    for ours, before in ((q, qkv[:, :q_heads]), (k, qkv[:, q_heads : q_heads + kv_heads])):
        within_twice(ours, *rotated(before), floor=1e-7)
    assert torch.equal(v, qkv[:, q_heads + kv_heads :])
    stored = {}
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored[slot] = token
    for slot in range(blocks * block_size):
        for cache, rows in ((k_cache, k), (v_cache, v)):
            entry = cache[slot // block_size, :, slot % block_size]
            if slot in stored:
                assert torch.equal(entry, rows[stored[slot]])
            else:
                assert entry.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (5, 1, 16)], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(9, 9)],
        [(3, 17), (8, 8), (1, 12), (5, 6)],
        [(1, 13), (1, 1), (1, 4), (1, 30)],
        [(1, 13), (7, 21), (1, 2), (1, 0), (4, 4), (1, 8)],
        [(1, 0), (1, 5), (1, 0)],
        [(2, 11), (0, 3), (1, 7)],
    ],
    ids=["one", "prefill", "chunks", "decode", "mixed", "padded", "empty"],
)
def test_paged_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    context = PagedContext(lengths, heads, dtype, generator)
    within_twice(
        context.run(), context.expected(dtype), context.expected(torch.float64), floor=1e-6
    )


def test_paged_attention_takes_rows_of_a_fused_matrix(generator: torch.Generator) -> None:
    context = PagedContext([(1, 6), (3, 9)], (4, 2, 8), torch.float32, generator)
    expected = context.run()
    fused = torch.cat((context.q, poisoned(4, 4, 8)), dim=1)
    context.queries = [fused[:1, :4], fused[1:, :4]]
    out = poisoned(4, 4, 8)
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    paged_attention(
        out,
        fused[:, :4],
        context.k_cache,
        context.v_cache,
        context.block_table,
        starts,
        torch.tensor([6, 9], dtype=torch.int32),
        torch.zeros(0),
        3,
        context.scale,
    )
    torch.testing.assert_close(out, expected)


def test_a_sequences_attention_does_not_depend_on_its_neighbours(
    generator: torch.Generator,
) -> None:
    lengths = [(1, 13), (7, 21), (1, 2), (1, 60), (4, 4), (1, 8)]
    context = PagedContext(lengths, (6, 2, 10), torch.float32, generator)
    together = context.run()
    starts = [0, *itertools.accumulate(new for new, _ in lengths)]
    for row in range(len(lengths)):
        alone = context.run([row])
        torch.testing.assert_close(
            together[starts[row] : starts[row + 1]], alone, rtol=1e-6, atol=1e-6
        )


def _samples(generator: torch.Generator) -> dict[str, tuple[object, ...]]:
    context = PagedContext([(1, 5), (3, 6)], (4, 2, 8), torch.float32, generator)
    x = torch.randn(4, 6, generator=generator)
    weight = torch.randn(6, generator=generator)
    table = torch.randn(50, 8, generator=generator)
    rows = torch.arange(4)
    return {
        "rms_norm": (poisoned(4, 6), x, weight, 1e-5),
        "add_rms_norm": (poisoned(4, 6), x.clone(), x, weight, 1e-5),
        "silu_mul": (poisoned(4, 3), x),
        "rope_append": (
            torch.randn(4, 4, 8, generator=generator),
            torch.randn(4, 2, 8, generator=generator),
            torch.randn(4, 2, 8, generator=generator),
            table,
            rows,
            rows,
            context.k_cache.nan_to_num(),
            context.v_cache.nan_to_num(),
        ),
        "paged_attention": (
            poisoned(4, 4, 8),
            context.q,
            context.k_cache,
            context.v_cache,
            context.block_table,
            torch.tensor([0, 1, 4], dtype=torch.int32),
            torch.tensor([5, 6], dtype=torch.int32),
            torch.zeros(0),
            3,
            0.5,
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "add_rms_norm", "silu_mul", "rope_append", "paged_attention"],
)
def test_schema_and_fake(name: str, generator: torch.Generator) -> None:
    """Each op mutates what its schema says and nothing else, and has a fake."""
    op = getattr(torch.ops.llava_engine, name).default
    torch.library.opcheck(
        op,
        _samples(generator)[name],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
