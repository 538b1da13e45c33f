"""Each CUDA kernel against float64, at twice the error of plain torch on the same GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.gpu import NEEDS_GPU
from support.kernels import PagedContext, blank, normal, within_twice

from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.library import references
from llava_engine.kernels.norm import add_rms_norm, rms_norm
from llava_engine.kernels.rope_kv import rope_append

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(1, 1), (3, 7), (2, 192), (17, 1000), (5, 4096), (64, 4104), (2, 11008)]
FLOOR = 1e-6


def check(op: Callable[..., None], like: torch.Tensor, *inputs: object) -> None:
    """The kernel, plain torch, and the reference in float64, on the same inputs."""
    ours, plain = torch.full_like(like, torch.nan), torch.full_like(like, torch.nan)
    op(ours, *inputs)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    truth = torch.full_like(like, torch.nan, dtype=torch.float64)
    with references():
        op(plain, *inputs)
        op(truth, *wide)
    within_twice(ours, plain, truth, FLOOR)


def norm_truth(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Written out: the reference's own arithmetic is float32."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal(generator, *shape, dtype=dtype) * 3
    weight = normal(generator, shape[1], dtype=dtype)
    ours, plain = blank(*shape, dtype=dtype), blank(*shape, dtype=dtype)
    truth = norm_truth(x, weight, 1e-5)
    rms_norm(ours, x, weight, 1e-5)
    with references():
        rms_norm(plain, x, weight, 1e-5)
    within_twice(ours, plain, truth, FLOOR)
    rms_norm(x, x, weight, 1e-5)
    assert torch.equal(x, ours), "in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_add_rms_norm(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, residual = (normal(generator, *shape, dtype=dtype) for _ in range(2))
    weight = normal(generator, shape[1], dtype=dtype)
    total = residual + x
    ours, plain = x.clone(), blank(*shape, dtype=dtype)
    add_rms_norm(ours, residual, ours, weight, 1e-6)
    assert torch.equal(residual, total)
    with references():
        rms_norm(plain, total, weight, 1e-6)
    within_twice(ours, plain, norm_truth(total, weight, 1e-6), FLOOR)


def test_rms_norm_takes_rows_that_are_not_aligned(generator: torch.Generator) -> None:
    x = normal(generator, 1 + 3 * 64, dtype=torch.float16)[1:].view(3, 64)
    weight = normal(generator, 64, dtype=torch.float16)
    ours, plain = blank(3, 64, dtype=torch.float16), blank(3, 64, dtype=torch.float16)
    rms_norm(ours, x, weight, 1e-5)
    with references():
        rms_norm(plain, x, weight, 1e-5)
    within_twice(ours, plain, norm_truth(x, weight, 1e-5), FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    gate_up = normal(generator, shape[0], 2 * shape[1], dtype=dtype) * 4
    check(silu_mul, blank(*shape, dtype=dtype), gate_up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [(4, 4, 8), (6, 2, 12), (3, 1, 2), (32, 8, 128), (6, 6, 32), (5, 5, 80)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_rope_append(
    tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    q_heads, kv_heads, dim = heads
    block_size, blocks, length = 5, 40, 300
    angles = torch.rand(length, dim // 2, generator=generator, device="cuda") * 7
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    fused = normal(generator, tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
    positions = torch.randint(length, (tokens,), generator=generator, device="cuda")
    slots = torch.randperm(blocks * block_size, generator=generator, device="cuda")[:tokens]
    slots[::5] = -1
    made = []
    for wide in (False, False, True):
        rows = (fused.double() if wide else fused).clone()
        q, k, v = rows.split((q_heads, kv_heads, kv_heads), dim=1)
        shape = (blocks, kv_heads, block_size, dim)
        caches = [blank(*shape, dtype=rows.dtype) for _ in range(2)]
        made.append((q, k, v, *caches))
    ours, plain, truth = made
    rope_append(*ours[:3], cos_sin, positions, slots, *ours[3:])
    with references():
        rope_append(*plain[:3], cos_sin, positions, slots, *plain[3:])
    # The reference computes in float32; this is it in float64.
    cos, sin = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    for x, other, wide_x in zip(ours[:2], plain[:2], truth[:2], strict=True):
        left, right = wide_x.chunk(2, dim=-1)
        rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        within_twice(x, other, rotated, FLOOR)
    assert torch.equal(ours[2], plain[2]), "v is left alone"
    for cache, new in zip(ours[3:], ours[1:3], strict=True):
        stored = slots >= 0
        flat = cache.transpose(1, 2).flatten(0, 1)  # [slots, heads, dim]
        assert torch.equal(flat[slots[stored]], new[stored])
        untouched = torch.ones(len(flat), dtype=torch.bool, device="cuda")
        untouched[slots[stored]] = False
        assert flat[untouched].isnan().all()


LENGTHS = {
    "decode": [(1, 13), (1, 1), (1, 700), (1, 31), (1, 32), (1, 33), (1, 128), (1, 129)],
    "one": [(1, 2049)],
    "padded": [(1, 0), (1, 5), (1, 0)],
    "prefill": [(200, 200)],
    "chunks": [(64, 65), (65, 129), (130, 333), (2, 64), (3, 500)],
    "mixed": [(1, 13), (70, 210), (1, 2), (1, 0), (4, 4), (0, 3), (1, 301), (2, 0)],
    "many": [(1 + 2 * (i % 3 == 0), 3 + 7 * i) for i in range(70)],
}
HEADS = [
    (4, 4, 128),
    (8, 2, 128),
    (5, 1, 64),
    (6, 6, 32),
    (4, 4, 8),
    (3, 1, 40),
    (2, 2, 80),
    (4, 2, 256),
    (4, 2, 12),
    (3, 3, 33),
]


# bfloat16 differs from float16 in two conversions and one instruction: fewer shapes will do.
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [(heads, dtype) for heads in HEADS for dtype in DTYPES[: 3 if heads in HEADS[:4] else 2]],
    ids=str,
)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_paged_attention(lengths: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator()
    print("seed", generator.seed())
    block_size = (4, 16, 64)[HEADS.index(heads) % 3]
    context = PagedContext(LENGTHS[lengths], heads, dtype, generator, block_size, "cuda")
    context.scale = heads[2] ** -0.5
    ours = context.run()
    with references():
        plain = context.run()
    within_twice(ours, plain, context.expected(torch.float64), FLOOR)
    assert torch.equal(context.run(), ours), "the order of the splits shows"


@pytest.mark.parametrize("block_size", [1, 3, 64, 100])
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 2, 64), (16, 16, 128)], ids=str)
def test_decoding_at_the_edges_of_blocks(block_size: int, heads: tuple[int, int, int]) -> None:
    """Each sequence by itself, split over many blocks of threads, and all together."""
    generator = torch.Generator()
    print("seed", generator.seed())
    lengths = [(1, n) for n in (0, 1, 2, 32, 33, 63, 64, 65, 665, 2048, 2049, 4096)]
    context = PagedContext(lengths, heads, torch.float16, generator, block_size, "cuda")
    truth, plain = context.expected(torch.float64), context.expected(torch.float16)
    within_twice(context.run(), plain, truth, FLOOR)
    for row in range(len(lengths)):
        alone = slice(row, row + 1)
        within_twice(context.run([row]), plain[alone], truth[alone], FLOOR)


def test_attention_depends_on_no_neighbour() -> None:
    generator = torch.Generator()
    lengths = LENGTHS["mixed"]
    context = PagedContext(lengths, (8, 8, 128), torch.float16, generator, 16, "cuda")
    together = context.run()
    starts = [0, *itertools.accumulate(new for new, _ in lengths)]
    for row, (new, _) in enumerate(lengths):
        if new:
            alone = context.run([row])
            rows = together[starts[row] : starts[row + 1]]
            # Another number of splits adds in another order.
            torch.testing.assert_close(rows, alone, rtol=2e-3, atol=2e-3)


def test_attention_takes_rows_of_a_fused_matrix() -> None:
    generator = torch.Generator()
    context = PagedContext([(1, 60), (70, 90)], (4, 2, 64), torch.float16, generator, 16, "cuda")
    out, q, *rest = context.arguments()
    paged_attention(out, q, *rest)
    fused = torch.cat((q, blank(len(q), 4, 64, dtype=q.dtype)), dim=1)
    again = torch.full_like(out, torch.nan)
    paged_attention(again, fused[:, :4], *rest)
    assert torch.equal(again, out)


def test_a_captured_decode_serves_other_lengths() -> None:
    """One graph, replayed under lengths, tables and queries that change in place."""
    generator = torch.Generator()
    heads = (8, 8, 128)
    longest = PagedContext([(1, 900)] * 3, heads, torch.float16, generator, 64, "cuda")
    arguments = longest.arguments()
    paged_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(*arguments)
    for lengths in ([900, 1, 0], [64, 65, 899], [300, 0, 17], [900, 900, 900]):
        context = PagedContext([(1, n) for n in lengths], heads, torch.float16, generator, 64)
        made = context.arguments()
        arguments[1].copy_(made[1])
        blocks = len(made[2])
        for cache, new in zip(arguments[2:4], made[2:4], strict=True):
            cache.fill_(torch.nan)
            cache[:blocks] = new.cuda()
        arguments[4][:, : made[4].shape[1]] = made[4].cuda()
        arguments[6].copy_(made[6])
        arguments[0].fill_(torch.nan)
        graph.replay()
        truth = context.expected(torch.float64)
        plain = context.expected(torch.float16)
        within_twice(arguments[0].cpu(), plain, truth, FLOOR)


def test_what_no_kernel_takes_is_refused() -> None:
    x = torch.ones(2, 8, device="cuda")
    with pytest.raises(RuntimeError, match="float16, bfloat16 and float32"):
        rms_norm(x.double(), x.double(), x[0].double(), 1e-5)
    with pytest.raises(RuntimeError, match="contiguous"):
        rms_norm(x.T, x.T, x[:, 0], 1e-5)
    with pytest.raises(RuntimeError, match="wrong type"):
        rms_norm(x, x, x[0].half(), 1e-5)
