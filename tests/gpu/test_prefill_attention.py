"""Hopper's prefill attention against float64, at twice the error of plain torch on the same GPU.

The caches are NaN wherever no key or value is, behind a context's end within its last block too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support.gpu import NEEDS_GPU
from support.kernels import PagedContext, poisoned, within_twice

from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.library import references

pytestmark = NEEDS_GPU

FLOOR = 1e-6
COUNTERS = 384  # words of the workspace that are zero between calls
LENGTHS = {
    "least": [(2, 2)],
    "a-tile": [(64, 64)],
    "a-row-more": [(65, 65)],
    "both-warpgroups": [(129, 129)],
    "prompt": [(620, 620)],
    "chunk": [(128, 777)],
    "long-chunk": [(512, 2048)],
    "long-prompt": [(1000, 1000)],
    "many-blocks": [(70, 4500)],
    "mixed": [(1, 13), (70, 210), (1, 2), (1, 0), (4, 4), (0, 3), (200, 328), (2, 0), (130, 130)],
    "many": [(1 + 40 * (i % 3), 90 + 7 * i) for i in range(70)],
}
HEADS = [(4, 4, 128), (32, 8, 128), (3, 3, 64), (24, 8, 64)]  # 64 and 128 query rows a block


def paged(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype = torch.float16,
    block_size: int = 64,
) -> PagedContext:
    generator = torch.Generator()
    print("seed", generator.seed())
    context = PagedContext(lengths, heads, dtype, generator, block_size, "cuda")
    context.scale = heads[2] ** -0.5
    for row, (_, keys) in enumerate(lengths):
        context.block_table[row, -(-keys // block_size) :] = 1 << 30  # not to be followed
        if keys == 0:
            context.queries[row].fill_(torch.nan)
    for parts in (context.queries, context.keys, context.values):
        parts[:] = [part.cuda() for part in parts]
    return context


def check(context: PagedContext) -> torch.Tensor:
    ours = context.run()
    with references():
        plain = context.run()
    assert ours.isfinite().all()
    within_twice(ours, plain, context.expected(torch.float64), FLOOR)
    assert not context.workspace[:COUNTERS].any(), "a counter is left behind"
    return ours


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(torch.float16, 64), (torch.bfloat16, 64), (torch.float16, 128)],
    ids=str,
)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_float64(
    lengths: str, heads: tuple[int, int, int], dtype: torch.dtype, block_size: int
) -> None:
    context = paged(LENGTHS[lengths], heads, dtype, block_size)
    ours = check(context)
    assert torch.equal(context.run(), ours), "the order of additions is not fixed"


@pytest.mark.parametrize("heads", HEADS[:1] + HEADS[2:3], ids=str)
def test_every_offset_of_a_chunk(heads: tuple[int, int, int]) -> None:
    """Where the diagonal and the context's end cross the tiles of queries and keys."""
    lengths = [
        (rows, rows + before)
        for rows in (2, 63, 127, 128, 130)
        for before in (0, 1, 62, 63, 64, 65, 126, 127, 128, 129, 200)
    ]
    check(paged(lengths, heads))


def test_a_peaked_softmax() -> None:
    context = paged([(70, 150), (300, 700)], (4, 4, 128))
    context.scale = 1.5
    check(context)


def test_scores_scaled_by_nothing_are_refused() -> None:
    context = paged([(70, 150)], (4, 4, 128))
    context.scale = 0.0
    with pytest.raises(RuntimeError, match="positive"):
        context.run()


def test_a_sequence_depends_on_no_neighbour() -> None:
    lengths = LENGTHS["mixed"]
    context = paged(lengths, (8, 8, 128))
    together = context.run()
    starts = [0, *itertools.accumulate(new for new, _ in lengths)]
    for row, (new, _) in enumerate(lengths):
        if new > 1:
            rows = together[starts[row] : starts[row + 1]]
            assert torch.equal(context.run([row]), rows)


@pytest.mark.parametrize("dim", [64, 128])
def test_rows_of_a_fused_matrix(dim: int) -> None:
    out, q, *rest = paged([(3, 60), (170, 190)], (4, 2, dim)).arguments()
    paged_attention(out, q, *rest)
    fused = torch.cat((q, poisoned(len(q), 4, dim, dtype=q.dtype, device="cuda")), dim=1)
    again = torch.full_like(out, torch.nan)
    paged_attention(again, fused[:, :4], *rest)
    assert out.isfinite().all()
    assert torch.equal(again, out)


def test_a_captured_step_serves_other_lengths() -> None:
    heads = (4, 4, 128)
    first = paged([(100, 100), (100, 400)], heads)
    arguments = first.arguments()
    paged_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(*arguments)
    for contexts in ((100, 400), (101, 399), (130, 101), (0, 256)):
        context = paged([(100, keys) for keys in contexts], heads)
        made = context.arguments()
        arguments[1].copy_(made[1])
        for cache, new in zip(arguments[2:4], made[2:4], strict=True):
            cache.fill_(torch.nan)
            cache[: len(new)] = new
        arguments[4][:, : made[4].shape[1]] = made[4]
        arguments[6].copy_(made[6])
        arguments[0].fill_(torch.nan)
        graph.replay()
        truth, plain = (context.expected(dtype) for dtype in (torch.float64, torch.float16))
        within_twice(arguments[0].cpu(), plain, truth, FLOOR)
