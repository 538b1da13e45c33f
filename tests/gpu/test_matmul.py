"""The products of many rows on the GPU, against float64 and torch at the same precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.gpu import NEEDS_HOPPER
from support.kernels import blank, normal, within_twice
from support.linear import angles

from llava_engine.kernels.library import references
from llava_engine.kernels.matmul import (
    HEAD_DIM,
    matmul_add,
    matmul_rope_append,
    matmul_silu_mul,
    matmul_store,
)

pytestmark = NEEDS_HOPPER

DTYPES = [torch.float16, torch.bfloat16]
ROWS = [1, 127, 128, 300, 577, 602, 1031]
# inputs, outputs: one block's depth and less; an odd number of tiles, a part of one; LLaVA's own.
SHAPES = [(64, 256), (24, 8), (592, 1024), (4096, 4096), (1096, 1160), (1024, 3072)]
FLOOR = 1e-6


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float8 and their scales."""
    scales = x.float().abs().amax(dim=1) / 448
    return (x.float() / scales.unsqueeze(1)).to(torch.float8_e4m3fn), scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_store_and_add(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs, outputs = shape
    x = normal(generator, rows, inputs, dtype=dtype)
    weight = normal(generator, outputs, inputs, dtype=dtype) * inputs**-0.5
    bias, before = (
        normal(generator, outputs, dtype=dtype),
        normal(generator, rows, outputs, dtype=dtype),
    )
    truth = x.double() @ weight.double().T
    ours = blank(rows, outputs, dtype=dtype)
    matmul_store(ours, x, weight)
    within_twice(ours, F.linear(x, weight), truth, FLOOR)
    matmul_store(ours.fill_(torch.nan), x, weight, bias)
    truth += bias.double()
    within_twice(ours, F.linear(x, weight, bias), truth, FLOOR)
    added, plain = before.clone(), before + F.linear(x, weight, bias)
    matmul_add(added, x, weight, bias)
    within_twice(added, plain, truth + before.double(), FLOOR)
    again = before.clone()
    matmul_add(again, x, weight, bias)
    assert torch.equal(again, added)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal(generator, 577, 1024, dtype=dtype)
    weight = normal(generator, 4096, 1024, dtype=dtype) / 16
    bias = normal(generator, 4096, dtype=dtype)
    ours, plain = blank(577, 4096, dtype=dtype), blank(577, 4096, dtype=dtype)
    matmul_store(ours, x, weight, bias, activation)
    with references():
        matmul_store(plain, x, weight, bias, activation)
    wide = x.double() @ weight.double().T + bias.double()
    truth = F.gelu(wide) if activation == "gelu" else wide / (1 + (-1.702 * wide).exp())
    within_twice(ours, plain, truth, FLOOR)


def test_rows_apart_and_a_part_of_a_matrix(generator: torch.Generator) -> None:
    x = normal(generator, 130, 3, 96, dtype=torch.float16)[:, 1]
    weight = normal(generator, 256, 128, dtype=torch.float16)[:, 32:]
    out = blank(130, 512, dtype=torch.float16)
    matmul_store(out[:, 128:384], x, weight)
    torch.testing.assert_close(out[:, 128:384], F.linear(x, weight), atol=2e-2, rtol=1e-2)
    assert out[:, :128].isnan().all() and out[:, 384:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [8, 192, 328, 11008])
@pytest.mark.parametrize("rows", [1, 160, 602])
def test_silu_mul(rows: int, wide: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal(generator, rows, 512, dtype=dtype)
    gate_up = normal(generator, 2 * wide, 512, dtype=dtype) / 16
    ours, plain = blank(rows, wide, dtype=dtype), blank(rows, wide, dtype=dtype)
    matmul_silu_mul(ours, x, gate_up)
    with references():
        matmul_silu_mul(plain, x, gate_up)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    within_twice(ours, plain, gate / (1 + (-gate).exp()) * up, FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (5, 2), (32, 8)], ids=str)
@pytest.mark.parametrize("rows", [3, 200, 602])
def test_rope_append(
    rows: int, heads: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    q_heads, kv_heads = heads
    x = normal(generator, rows, 256, dtype=dtype)
    qkv = normal(generator, (q_heads + 2 * kv_heads) * HEAD_DIM, 256, dtype=dtype) / 16
    cos_sin = angles(900, HEAD_DIM, generator)
    positions = torch.randint(900, (rows,), generator=generator, device="cuda")
    slots = torch.randperm(1280, generator=generator, device="cuda")[:rows]
    slots[1] = -1

    def run(of: torch.dtype) -> tuple[torch.Tensor, ...]:
        q = blank(rows, q_heads, HEAD_DIM, dtype=of)
        caches = [blank(20, kv_heads, 64, HEAD_DIM, dtype=of) for _ in range(2)]
        matmul_rope_append(q, *caches, x.to(of), qkv.to(of), cos_sin, positions, slots)
        return q, *caches

    ours = run(dtype)
    with references():
        plain, truth = run(dtype), run(torch.float64)
    for mine, theirs, right in zip(ours, plain, truth, strict=True):
        written = ~right.isnan()
        assert torch.equal(~mine.isnan(), written)
        within_twice(mine[written], theirs[written], right[written], FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [129, 602])
def test_float8(rows: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x, x_scales = quantised(normal(generator, rows, 4096, dtype=dtype) * 20)
    weight, weight_scales = quantised(normal(generator, 2048, 4096, dtype=dtype) / 64)
    scales = x_scales, weight_scales
    exact = (x.double() * x_scales.double()[:, None]) @ (
        weight.double() * weight_scales.double()[:, None]
    ).T
    before = normal(generator, rows, 2048, dtype=dtype)
    ours, theirs = (
        before.clone(),
        torch._scaled_mm(
            x, weight.T, x_scales[:, None], weight_scales[None], out_dtype=torch.bfloat16
        ),
    )
    matmul_add(ours, x, weight, None, *scales)
    within_twice(ours, before + theirs, before.double() + exact, 1e-2)
    activated = blank(rows, 1024, dtype=dtype)
    matmul_silu_mul(activated, x, weight, *scales)
    gate, up = exact.chunk(2, dim=1)
    gate_theirs, up_theirs = theirs.chunk(2, dim=1)
    within_twice(activated, F.silu(gate_theirs) * up_theirs, gate / (1 + (-gate).exp()) * up, 1e-2)
    q, cache = blank(rows, 8, HEAD_DIM, dtype=dtype), blank(12, 4, 64, HEAD_DIM, dtype=dtype)
    cos_sin = torch.cat((torch.ones(1, 64), torch.zeros(1, 64)), dim=1).cuda()
    places = torch.arange(rows, device="cuda")
    matmul_rope_append(
        q,
        cache,
        cache.clone(),
        x,
        weight,
        cos_sin,
        places * 0,
        places,
        x_scales=x_scales,
        weight_scales=weight_scales,
    )
    within_twice(q.flatten(1), theirs[:, :1024], exact[:, :1024], 1e-2)


def test_refuses_what_it_cannot(generator: torch.Generator) -> None:
    x = normal(generator, 130, 64, dtype=torch.float16)
    weight = normal(generator, 64, 64, dtype=torch.float16)
    for bad in (x.float(), x[:, :56], x.t()):
        with pytest.raises(RuntimeError):
            matmul_add(normal(generator, len(bad), 64, dtype=torch.float16), bad, weight)
