"""The products of many rows with quantised weights on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.gpu import NEEDS_HOPPER
from support.kernels import blank, normal
from support.linear import angles
from support.quant_products import FORMATS, Errors, random_weight

from llava_engine.kernels.library import references
from llava_engine.kernels.matmul import (
    HEAD_DIM,
    matmul_add,
    matmul_rope_append,
    matmul_silu_mul,
    matmul_store,
)
from llava_engine.quant import Format

pytestmark = NEEDS_HOPPER

DTYPES = [torch.float16, torch.bfloat16]
ROWS = [1, 17, 32, 33, 64, 100, 130, 602, 1031]  # every width of a tile, and several tiles
# Inputs, outputs: half a slot, a part of a tile; slots and a half; LLaVA-1.5-7B's and 13B's own.
SHAPES = [(64, 16), (192, 400), (2240, 1168), (4096, 4096), (11008, 4096), (13824, 5120)]
SILU_SHAPES = [(64, 16), (448, 48), (5120, 272), (4096, 22016)]
HEADS = [(4, 4), (5, 2), (32, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_add(
    kind: Format, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs, outputs = shape
    weight = random_weight(kind, outputs, inputs, generator)
    matrix, exact = weight.matrix(), weight.dequantize(torch.float32).double()
    whole = weight.dequantize(dtype)
    bias = normal(generator, outputs, dtype=dtype)
    errors = Errors()
    for rows in ROWS:
        x = normal(generator, rows, inputs, dtype=dtype)
        before = normal(generator, rows, outputs, dtype=dtype)
        ours, plain = before.clone(), before + F.linear(x, whole)
        matmul_add(ours, x, matrix.weight, weight_scales=matrix.scales)
        errors.add(ours, plain, before.double() + x.double() @ exact.T)
        again = before.clone()
        matmul_add(again, x, matrix.weight, weight_scales=matrix.scales)
        assert torch.equal(again, ours)
        if kind != "nf4":  # which takes no bias
            plus, plain = before.clone(), before + F.linear(x, whole, bias)
            matmul_add(plus, x, matrix.weight, bias, weight_scales=matrix.scales)
            errors.add(plus, plain, before.double() + x.double() @ exact.T + bias.double())
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SILU_SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_silu_mul(
    kind: Format, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs, outputs = shape
    weight = random_weight(kind, outputs, inputs, generator)
    matrix = weight.matrix(outputs // 2)
    exact = weight.dequantize(torch.float32).double()
    errors = Errors()
    for rows in ROWS:
        x = normal(generator, rows, inputs, dtype=dtype)
        ours, plain = (blank(rows, outputs // 2, dtype=dtype) for _ in range(2))
        matmul_silu_mul(ours, x, matrix.weight, weight_scales=matrix.scales)
        with references():
            matmul_silu_mul(plain, x, matrix.weight, weight_scales=matrix.scales)
        gate, up = (x.double() @ exact.T).chunk(2, dim=1)
        errors.add(ours, plain, gate / (1 + (-gate).exp()) * up)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_rope_append(
    kind: Format, heads: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    q_heads, kv_heads = heads
    weight = random_weight(kind, (q_heads + 2 * kv_heads) * HEAD_DIM, 320, generator)
    matrix = weight.matrix(HEAD_DIM // 2)
    exact = weight.dequantize(torch.float32).double()
    cos_sin = angles(900, HEAD_DIM, generator)
    errors = Errors()
    for rows in ROWS:
        x = normal(generator, rows, 320, dtype=dtype)
        positions = torch.randint(900, (rows,), generator=generator, device="cuda")
        slots = torch.randperm(1280, generator=generator, device="cuda")[:rows]
        slots[1:2] = -1
        places = cos_sin, positions, slots
        ours, plain, truths = (
            (
                blank(rows, q_heads, HEAD_DIM, dtype=of),
                *(blank(20, kv_heads, 64, HEAD_DIM, dtype=of) for _ in range(2)),
            )
            for of in (dtype, dtype, torch.float64)
        )
        matmul_rope_append(*ours, x, matrix.weight, *places, weight_scales=matrix.scales)
        with references():
            matmul_rope_append(*plain, x, matrix.weight, *places, weight_scales=matrix.scales)
            matmul_rope_append(*truths, x.double(), exact, *places)
        for mine, theirs, truth in zip(ours, plain, truths, strict=True):
            written = ~truth.isnan()
            assert torch.equal(~mine.isnan(), written), "what is written, and what is left alone"
            errors.add(mine[written], theirs[written], truth[written])
    errors.check()


def test_refuses_what_it_cannot(generator: torch.Generator) -> None:
    weight = random_weight("int8", 64, 128, generator)
    matrix = weight.matrix()
    x = normal(generator, 130, 128, dtype=torch.float16)
    out = x.new_empty(130, 64)
    with pytest.raises(RuntimeError):
        matmul_store(out, x, matrix.weight)
    with pytest.raises(RuntimeError):
        matmul_add(out, x, matrix.weight)
    with pytest.raises(RuntimeError):
        matmul_add(out, x, matrix.weight, weight_scales=matrix.scales[:32])
    with pytest.raises(RuntimeError):
        matmul_add(out, x[:, :96], matrix.weight[:, :96].contiguous(), weight_scales=matrix.scales)
    with pytest.raises(RuntimeError):
        matmul_add(out.float(), x.float(), matrix.weight, weight_scales=matrix.scales)
    packed = random_weight("nf4", 64, 128, generator).matrix()
    with pytest.raises(RuntimeError):
        matmul_add(out, x, packed.weight, out[0], weight_scales=packed.scales)
