"""The products with quantised weights on the GPU: against float64, and as an overlapping chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.gpu import NEEDS_GPU
from support.kernels import blank, normal, within_twice
from support.linear import angles, qkv_case, qkv_truth, silu_truth
from support.quant_products import FORMATS, HIDDEN, Errors, Layers, random_weight

from llava_engine.kernels.library import programmatic_launch, references
from llava_engine.kernels.quant_linear import (
    QuantMatrix,
    dequantize_rows,
    most_rows,
    quant_linear_add,
    quant_norm_linear_silu_mul,
    quant_norm_qkv_rope_append,
)
from llava_engine.quant import Format

pytestmark = NEEDS_GPU

DTYPES = [torch.float16, torch.bfloat16]
# Inputs, outputs: the least; half a step at the end; a last piece of a few; LLaVA's own; the most.
SHAPES = [(64, 16), (192, 96), (2240, 48), (4096, 4096), (11008, 4096), (5120, 64), (16384, 2192)]
# The last two in NF4: of 8 rows x fills what is behind the table; of 4 rows, and 8 do not fit.
SILU_SHAPES = [(64, 16), (448, 48), (4096, 22016), (5120, 96), (6144, 96), (12288, 64)]
# x divided into spans, a last span of one step among them: 16 rows of so many inputs.
ROWS = [*range(1, 18), 50]
# Query heads, key heads, dimensions; inputs. The last is LLaVA-1.5-7B's, as (4096, 4096),
# (11008, 4096) and (4096, 22016) are above.
QKV_SHAPES = [
    ((4, 4, 8), 320),
    ((3, 1, 16), 320),
    ((8, 2, 128), 320),
    ((5, 5, 96), 320),
    ((32, 32, 128), 4096),
]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_add(
    kind: Format, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs, outputs = shape
    weight = random_weight(kind, outputs, inputs, generator)
    matrix, exact = weight.matrix(), weight.dequantize(torch.float32).double()
    errors = Errors()
    for rows in ROWS:
        x = normal(generator, rows, inputs, dtype=dtype)
        before = normal(generator, rows, outputs, dtype=dtype)
        ours, plain = before.clone(), before.clone()
        quant_linear_add(ours, x, matrix)
        with references():
            quant_linear_add(plain, x, matrix)
        errors.add(ours, plain, before.double() + x.double() @ exact.T)
        again = before.clone()
        quant_linear_add(again, x, matrix)
        assert torch.equal(again, ours)
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
    exact = weight.dequantize(torch.float32)
    gain = normal(generator, inputs, dtype=dtype)
    errors = Errors()
    for rows in ROWS:
        x = normal(generator, rows, inputs, dtype=dtype) * 3
        ours, plain = (blank(rows, outputs // 2, dtype=dtype) for _ in range(2))
        quant_norm_linear_silu_mul(ours, x, gain, EPS, matrix)
        with references():
            quant_norm_linear_silu_mul(plain, x, gain, EPS, matrix)
        errors.add(ours, plain, silu_truth(x, gain, EPS, exact))
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "inputs"), QKV_SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_qkv(
    kind: Format,
    heads: tuple[int, int, int],
    inputs: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    outputs = (heads[0] + 2 * heads[1]) * heads[2]
    weight = random_weight(kind, outputs, inputs, generator)
    matrix = weight.matrix(heads[2] // 2)
    errors = Errors()
    for rows in ROWS:
        case = qkv_case(rows, heads, inputs, dtype, generator)
        x, gain, eps, _, *places = case.inputs
        ours, plain = case.blank(), case.blank()
        quant_norm_qkv_rope_append(*ours, x, gain, eps, matrix, *places)
        with references():
            quant_norm_qkv_rope_append(*plain, x, gain, eps, matrix, *places)
        exact = (x, gain, eps, weight.dequantize(torch.float32), *places)
        truths = qkv_truth(dataclasses.replace(case, inputs=exact))
        for mine, theirs, truth in zip(ours, plain, truths, strict=True):
            written = ~truth.isnan()
            assert torch.equal(written, ~mine.isnan()), "what is written, and what is left alone"
            errors.add(mine[written], theirs[written], truth[written])
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [64, 192, 11008])
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantised_rows_are_the_references_to_the_bit(
    kind: Format, inputs: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = random_weight(kind, 96, inputs, generator)
    for apart in (1, 8, 48):
        matrix = weight.matrix(apart)
        for first, rows in ((0, 96), (5, 17), (95, 1)):
            out = blank(rows, inputs, dtype=dtype)
            dequantize_rows(out, matrix, first)
            assert torch.equal(out, weight.dequantize(dtype)[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", FORMATS)
def test_layers(kind: Format, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Few rows by the products here, more by those of many rows, or where these do not take the
    heads by cuBLAS: all as with the dequantised weights."""
    layers = Layers(kind, dtype, generator, dim=dim)
    for count in (1, 8, 9, 16, 17, 32, 33, 300):
        rows = layers.random(count, HIDDEN)
        ours, plain = (layers.run(rows, quantised=quantised) for quantised in (True, False))
        with references():
            truth = layers.run(rows, quantised=False, dtype=torch.float64)
        within_twice(ours, plain, truth)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_of_which_some_are_whole(kind: Format, generator: torch.Generator) -> None:
    """As where a checkpoint skips modules, up to prompts that take other kernels."""
    for whole, dim in ((1, 64), (3, 128)):
        layers = Layers(kind, torch.float16, generator, dim=dim, whole=whole)
        for count in (1, 300, 600, 1000):
            rows = layers.random(count, HIDDEN)
            ours, plain = (layers.run(rows, quantised=quantised) for quantised in (True, False))
            with references():
                truth = layers.run(rows, quantised=False, dtype=torch.float64)
            within_twice(ours, plain, truth)


def test_what_has_no_place_is_refused(generator: torch.Generator) -> None:
    half = torch.float16
    matrix = random_weight("nf4", 32, 128, generator).matrix()
    x, residual = (torch.ones(2, size, device="cuda", dtype=half) for size in (128, 32))
    with pytest.raises(RuntimeError, match="weight has the wrong length"):
        quant_linear_add(torch.ones(2, 48, device="cuda", dtype=half), x, matrix)
    plain = dataclasses.replace(matrix, weight=matrix.weight.view(torch.int16))
    with pytest.raises(RuntimeError, match="quantised weights are"):
        quant_linear_add(residual, x, plain)
    with pytest.raises(RuntimeError, match="not so many rows"):
        dequantize_rows(blank(8, 128, dtype=half), matrix, 25)
    assert most_rows(32, 128, x.device, packed=True) == 16


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_programmatic_chain_gives_what_single_launches_give(
    kind: Format, rows: int, generator: torch.Generator
) -> None:
    """Four layers of 7B's width, overlapping; a kernel that reads too early would differ."""
    hidden, wide, heads, dim, layers = 4096, 11008, 32, 128, 4
    half = torch.float16

    def matrix(outputs: int, inputs: int, apart: int) -> QuantMatrix:
        return random_weight(kind, outputs, inputs, generator).matrix(apart)

    weights = [
        (
            matrix(3 * hidden, hidden, dim // 2),
            matrix(hidden, hidden, 1),
            matrix(2 * wide, hidden, wide),
            matrix(hidden, wide, 1),
        )
        for _ in range(layers)
    ]
    gain = normal(generator, hidden, dtype=half) * 0.1
    caches = normal(generator, 2, rows, heads, 64, dim, dtype=half).unbind()
    positions = torch.arange(rows, device="cuda")
    places = angles(300, dim, generator), positions, positions * 64
    start = normal(generator, rows, hidden, dtype=half)
    x, q = start.clone(), blank(rows, heads, dim, dtype=half)
    activated = blank(rows, wide, dtype=half)

    def step() -> None:
        x.copy_(start)
        for qkv, out, gate_up, down in weights:
            quant_norm_qkv_rope_append(q, *caches, x, gain, EPS, qkv, *places)
            quant_linear_add(x, q.view(rows, hidden), out)
            quant_norm_linear_silu_mul(activated, x, gain, EPS, gate_up)
            quant_linear_add(x, activated, down)

    step()
    single = x.clone()
    assert single.isfinite().all()
    replay = captured(step)
    for _ in range(3):
        x.fill_(torch.nan)
        replay()
        assert torch.equal(x, single)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a graph whose kernels overlap."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream), programmatic_launch(True):
        step()
    return graph.replay
