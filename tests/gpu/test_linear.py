"""The products of few rows on the GPU: against float64, and as a chain of overlapping kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.gpu import NEEDS_GPU
from support.kernels import PagedContext, blank, normal, within_twice
from support.linear import (
    HEADS,
    angles,
    product_truth,
    qkv_case,
    qkv_truth,
    silu_truth,
)

from llava_engine.kernels.attention import paged_attention
from llava_engine.kernels.library import programmatic_launch, references
from llava_engine.kernels.linear import (
    linear_add,
    norm_linear,
    norm_linear_silu_mul,
    norm_qkv_rope_append,
)

pytestmark = NEEDS_GPU

DTYPES = [torch.float16, torch.bfloat16]
# inputs, outputs: the least; a unit that is not full; odd last pieces; LLaVA's own.
SHAPES = [(32, 2), (96, 6), (1056, 34), (4128, 2500), (4096, 4096), (11008, 4096), (5120, 64)]
FLOOR = 1e-6
EPS = 1e-5


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ours, plain torch's, in float64


def check(draw: Callable[[], Results]) -> None:
    """Of so many draws that the errors are those of hundreds of numbers; of a few they are chance,
    and plain torch's may be next to nothing."""
    first = draw()
    draws = [first, *(draw() for _ in range(256 // first[0].numel()))]
    within_twice(*(torch.cat(results) for results in zip(*draws, strict=True)), FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_linear_add(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs, outputs = shape

    def draw() -> Results:
        x = normal(generator, rows, inputs, dtype=dtype)
        weight = normal(generator, outputs, inputs, dtype=dtype) * inputs**-0.5
        before = normal(generator, rows, outputs, dtype=dtype)
        ours, plain, again = before.clone(), before.clone(), before.clone()
        linear_add(ours, x, weight)
        with references():
            linear_add(plain, x, weight)
        linear_add(again, x, weight)
        assert torch.equal(again, ours)
        return ours, plain, before.double() + x.double() @ weight.double().T

    check(draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_norm_linear_and_silu_mul(
    rows: int,
    shape: tuple[int, int],
    silu: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    inputs, outputs = shape
    op, truth = (norm_linear_silu_mul, silu_truth) if silu else (norm_linear, product_truth)

    def draw() -> Results:
        x = normal(generator, rows, inputs, dtype=dtype) * 3
        gain = normal(generator, inputs, dtype=dtype)
        weight = normal(generator, outputs, inputs, dtype=dtype) * inputs**-0.5
        size, kind = (outputs // 2, dtype) if silu else (outputs, torch.float32)
        ours, plain = (blank(rows, size, dtype=kind) for _ in range(2))
        op(ours, x, gain, EPS, weight)
        with references():
            op(plain, x, gain, EPS, weight)
        return ours, plain, truth(x, gain, EPS, weight)

    check(draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_norm_qkv_rope_append(
    rows: int, heads: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs = 288
    case = qkv_case(rows, heads, inputs, dtype, generator)
    ours, plain = case.blank(), case.blank()
    norm_qkv_rope_append(*ours, *case.inputs)
    with references():
        norm_qkv_rope_append(*plain, *case.inputs)
    for mine, theirs, truth in zip(ours, plain, qkv_truth(case), strict=True):
        written = ~truth.isnan()
        assert torch.equal(written, ~mine.isnan()), "what is written, and what is left alone"
        within_twice(mine[written], theirs[written], truth[written], FLOOR)


def test_what_has_no_room_is_refused() -> None:
    x, weight = (torch.ones(8, 16384, device="cuda", dtype=torch.float16) for _ in range(2))
    with pytest.raises(RuntimeError, match="too long"):
        linear_add(torch.ones(8, 8, device="cuda", dtype=torch.float16), x, weight)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_a_programmatic_chain_gives_what_single_launches_give(
    rows: int, generator: torch.Generator
) -> None:
    """Four layers of 7B's width, overlapping; a kernel that reads too early would differ."""
    hidden, wide, heads, dim, layers = 4096, 11008, 32, 128, 4
    half = torch.float16
    lengths = [(1, n) for n in (665, 64, 1, 130, 5, 700, 2, 999)[:rows]]
    context = PagedContext(lengths, (heads, heads, dim), half, torch.Generator(), 64, "cuda")
    _, _, _, _, table, starts, contexts, workspace, _, scale = context.arguments()
    width = context.k_cache.shape[0]
    caches = [
        normal(generator, 2, width, heads, 64, dim, dtype=half).unbind() for _ in range(layers)
    ]
    weights = [
        (
            normal(generator, hidden, dtype=half),
            normal(generator, 3 * hidden, hidden, dtype=half) * hidden**-0.5,
            normal(generator, hidden, hidden, dtype=half) * hidden**-0.5,
            normal(generator, 2 * wide, hidden, dtype=half) * hidden**-0.5,
            normal(generator, hidden, wide, dtype=half) * wide**-0.5,
        )
        for _ in range(layers)
    ]
    positions = contexts.long() - 1
    blocks = table.long().gather(1, (positions // 64).unsqueeze(1)).squeeze(1)
    slots = blocks * 64 + positions % 64
    cos_sin = angles(1024, dim, generator)
    head = normal(generator, 32064, hidden, dtype=half) * hidden**-0.5
    start = normal(generator, rows, hidden, dtype=half)
    x, q, attended = start.clone(), blank(rows, heads, dim, dtype=half), None
    attended, activated = torch.empty_like(q), blank(rows, wide, dtype=half)
    logits = blank(rows, 32064, dtype=torch.float32)

    def step() -> None:
        x.copy_(start)
        for (gain, qkv, out, gate_up, down), (keys, values) in zip(weights, caches, strict=True):
            norm_qkv_rope_append(q, keys, values, x, gain, EPS, qkv, cos_sin, positions, slots)
            paged_attention(attended, q, keys, values, table, starts, contexts, workspace, 1, scale)
            linear_add(x, attended.view(rows, -1), out)
            norm_linear_silu_mul(activated, x, gain, EPS, gate_up)
            linear_add(x, activated, down)
        norm_linear(logits, x, weights[0][0], EPS, head)

    step()
    assert logits.isfinite().all()
    alone = logits.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), programmatic_launch(True):
        step()
    for replay in range(30):
        start.copy_(normal(generator, rows, hidden, dtype=half))
        logits.fill_(torch.nan)
        graph.replay()
        chained = logits.clone()
        step()
        assert torch.equal(chained, logits), f"replay {replay}"
        assert not torch.equal(chained, alone)
