"""fp8 rows on the GPU: bit for bit as the CPU makes them, behind norms to a step, and products."""

from __future__ import annotations

import math

import pytest
import torch
from support.gpu import GPU, NEEDS_GPU
from support.kernels import poisoned, within_twice

from llava_engine.kernels.fp8 import FP8, quantize_rows, rms_norm_fp8
from llava_engine.kernels.library import programmatic_launch
from llava_engine.kernels.norm import add_rms_norm
from llava_engine.quant.fp8 import Fp8Weight, fp8_linear, require_fp8

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Odd sizes, one thread, LLaVA's own, and the most of each way to hold a row.
SHAPES = [
    (1, 1),
    (3, 7),
    (2, 192),
    (17, 1000),
    (620, 4096),
    (64, 4104),
    (33, 11008),
    (2, 16384),
    (2, 20480),
    (1, 32767),
    (1, 32768),
]


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator("cuda")
    generator.seed()  # fresh inputs every time; the seed is in the failure's report
    print("seed", generator.initial_seed())
    return generator


def spread(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, a few of them fifty times as large."""
    x = torch.randn(shape, generator=generator, device="cuda")
    x[torch.rand(shape, generator=generator, device="cuda") < 0.01] *= 50
    return x.to(dtype)


def blanks(rows: int, columns: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    return poisoned(rows, columns, dtype=FP8, device=device), poisoned(rows, device=device)


def quantized_on_the_cpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, scales = blanks(*x.shape, device="cpu")
    quantize_rows(out, scales, x.cpu())
    return out, scales


def same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    ours, theirs = out.cpu().float(), expected.float()
    return torch.equal(ours.nan_to_num(nan=999.0), theirs.nan_to_num(nan=999.0)) and torch.equal(
        ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan()
    )


def dequantized(out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return out.double() * scales.double().unsqueeze(1)


def within_a_step(out: torch.Tensor, expected: torch.Tensor) -> None:
    """No element further from its like than to the next number of e4m3."""

    def places(values: torch.Tensor) -> torch.Tensor:
        codes = values.cpu().view(torch.uint8).int()
        return torch.where(codes < 128, codes, 128 - codes)

    assert not out.float().isnan().any()
    assert (places(out) - places(expected)).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_rows_is_the_cpus(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = spread(generator, *shape, dtype=dtype)
    out, scales = blanks(*shape)
    quantize_rows(out, scales, x)
    expected, expected_scales = quantized_on_the_cpu(x)
    assert torch.equal(scales.cpu(), expected_scales)
    assert same(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [40, 37])
def test_rows_that_are_zero_tiny_or_not_finite(columns: int, dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 3, 6 * columns, device="cuda").view(6, columns).to(dtype)
    x[0] = 0
    x[1, -1] = torch.nan
    x[2, columns // 2] = torch.inf
    x[3, 0] = -torch.inf
    x[4] *= torch.finfo(dtype).tiny
    out, scales = blanks(6, columns)
    quantize_rows(out, scales, x)
    expected, expected_scales = quantized_on_the_cpu(x)
    assert torch.equal(scales.cpu().nan_to_num(nan=-1.0), expected_scales.nan_to_num(nan=-1.0))
    assert same(out, expected)
    assert float(scales[0]) == 1.0 and out.float()[1:4].isnan().any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_boundary_of_a_half(dtype: torch.dtype) -> None:
    """All halves up to 448, which the row's scale of 1 leaves as they are."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    x = x[x.abs() <= 448]
    x = torch.cat((x, x.new_full((-len(x) % 8,), 448.0)))
    rows = x.view(-1, 8).to("cuda", dtype)
    rows = torch.cat((rows, torch.full_like(rows, 448.0)), dim=1)
    out, scales = blanks(*rows.shape)
    quantize_rows(out, scales, rows)
    assert (scales == 1).all()
    assert same(out, quantized_on_the_cpu(rows)[0])


def test_rows_that_are_not_aligned(generator: torch.Generator) -> None:
    x = spread(generator, 1 + 3 * 64, dtype=torch.float16)[1:].view(3, 64)
    room = poisoned(1 + 3 * 64, dtype=FP8, device="cuda")
    out, scales = room[1:].view(3, 64), poisoned(3, device="cuda")
    quantize_rows(out, scales, x)
    expected, expected_scales = quantized_on_the_cpu(x)
    assert same(out, expected) and torch.equal(scales.cpu(), expected_scales)
    assert room[:1].float().isnan().all(), "written before the rows"


def test_no_rows() -> None:
    out, scales = blanks(0, 64)
    quantize_rows(out, scales, torch.empty(0, 64, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Errors of hundreds of numbers are judged together: that of one may be next to nothing."""
    seen = []
    for _ in range(max(1, 500 // math.prod(shape))):
        x, weight = spread(generator, *shape, dtype=dtype), spread(generator, shape[1], dtype=dtype)
        ours, plain = blanks(*shape), blanks(*shape, device="cpu")
        rms_norm_fp8(*ours, x, weight, 1e-5)
        rms_norm_fp8(*plain, x.cpu(), weight.cpu(), 1e-5)
        # A sum in another order may put a normalised element one step of its type off.
        torch.testing.assert_close(
            ours[1].cpu(), plain[1], rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0
        )
        within_a_step(ours[0], plain[0])
        wide = x.double().cpu()
        truth = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double().cpu()
        seen.append((dequantized(*ours).cpu(), dequantized(*plain), truth))
    within_twice(*(torch.cat(x) for x in zip(*seen, strict=True)))


@pytest.mark.parametrize("programmatic", [False, True], ids=["plain", "programmatic"])
def test_a_captured_chain_gives_what_it_gives_uncaptured(
    programmatic: bool, generator: torch.Generator
) -> None:
    """Each of two reads what the one before it has just written."""
    x, residual = (spread(generator, 300, 4096, dtype=torch.float16) for _ in range(2))
    weight, normal = spread(generator, 4096, dtype=torch.float16), torch.empty_like(x)
    made = [blanks(300, 4096) for _ in range(2)]

    def run() -> None:
        add_rms_norm(normal, residual, x, weight, 1e-5)
        rms_norm_fp8(*made[0], residual, weight, 1e-5)
        add_rms_norm(normal, residual, x, weight, 1e-5)
        quantize_rows(*made[1], residual)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), programmatic_launch(programmatic):
        run()
    for _ in range(3):
        x.copy_(spread(generator, 300, 4096, dtype=torch.float16))
        first = residual + x
        second = first + x
        graph.replay()
        assert torch.equal(residual, second)
        expected = blanks(300, 4096)
        rms_norm_fp8(*expected, first, weight, 1e-5)
        assert torch.equal(made[0][0].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(made[0][1], expected[1])
        assert same(made[1][0], quantized_on_the_cpu(second)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_is_the_cpus(dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = spread(generator, 4096, 1408, dtype=dtype) * 0.02
    ours, theirs = Fp8Weight.of(weight), Fp8Weight.of(weight.cpu())
    assert torch.equal(ours.scales.cpu(), theirs.scales)
    assert same(ours.values, theirs.values)


@pytest.mark.parametrize("shape", [(16, 256, 64), (130, 4096, 512), (620, 11008, 4096)], ids=str)
def test_products_against_torchs(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    """torch._scaled_mm on the same numbers, whose rows have scales of their own as ours do."""
    require_fp8(GPU, torch.bfloat16, references=False)
    rows, inputs, outputs = shape
    x = spread(generator, rows, inputs, dtype=torch.bfloat16)
    weight = Fp8Weight.of(spread(generator, outputs, inputs, dtype=torch.bfloat16) * 0.02)
    values, scales = blanks(rows, inputs)
    quantize_rows(values, scales, x)
    truth = dequantized(values, scales) @ dequantized(weight.values, weight.scales).T
    torchs = torch._scaled_mm(
        values,
        weight.values.T,
        scale_a=scales.unsqueeze(1),
        scale_b=weight.scales.unsqueeze(0),
        out_dtype=torch.bfloat16,
    )
    within_twice(fp8_linear(x, weight), torchs, truth)
