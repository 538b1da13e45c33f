"""Packed weights against bitsandbytes' dequantisation, and the references against float64."""

from __future__ import annotations

import dataclasses

import bitsandbytes.functional as bnb
import pytest
import torch
from support.kernels import poisoned
from support.linear import qkv_case, qkv_truth, silu_truth
from support.quant_products import FORMATS, HIDDEN, Layers, random_weight

from llava_engine.kernels.quant_linear import (
    dequantize_rows,
    most_rows,
    pack_nf4,
    quant_linear_add,
    quant_norm_linear_silu_mul,
    quant_norm_qkv_rope_append,
    unpack_nf4,
)
from llava_engine.quant import Format
from llava_engine.quant.nf4 import Nf4Weight

CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
}
# Outputs, inputs, how far apart a pair's rows are: 64 inputs alone, an odd number of blocks, rows
# in two groups of scales.
SHAPES = [(16, 64, 1), (96, 192, 24), (96, 256, 48), (32, 11008, 1)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_nf4_is_bitsandbytes_to_the_bit(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    outputs, inputs, apart = shape
    plain = torch.randn(outputs, inputs, generator=generator)
    codes, state = bnb.quantize_4bit(
        plain, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    weight = Nf4Weight.of(plain)
    matrix = weight.matrix(apart)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state.dtype = dtype
        truth = bnb.dequantize_4bit(codes, state)
        out = poisoned(outputs - 5, inputs, dtype=dtype)
        dequantize_rows(out, matrix, 3)
        assert torch.equal(out, truth[3:-2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing_and_takes_no_room(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    outputs, inputs, apart = shape
    weight = random_weight("nf4", outputs, inputs, generator)
    assert isinstance(weight, Nf4Weight)
    packed = pack_nf4(weight.codes, weight.absmax, weight.scales2, apart)
    again = unpack_nf4(packed, inputs, apart)
    for mine, theirs in zip(again, (weight.codes, weight.absmax, weight.scales2), strict=True):
        assert torch.equal(mine, theirs)
    if inputs % 128 == 0:
        assert packed.nbytes == weight.nbytes - weight.code2.nbytes


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_other_formats_are_taken_as_they_are(kind: Format, generator: torch.Generator) -> None:
    weight = random_weight(kind, 32, 192, generator)
    matrix = weight.matrix()
    assert matrix.weight.data_ptr() == weight.tensors()[0].data_ptr()
    out = poisoned(7, 192, dtype=torch.float16)
    dequantize_rows(out, matrix, 9)
    assert torch.equal(out, weight.dequantize(torch.float16)[9:16])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_products(kind: Format, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = random_weight(kind, 32, 192, generator)
    matrix = weight.dequantize(torch.float32)
    x, gain, before = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 192), (192,), (3, 32))
    )
    added = before.clone()
    quant_linear_add(added, x, weight.matrix())
    truth = before.double() + x.double() @ matrix.double().T
    torch.testing.assert_close(added.double(), truth, **CLOSE[dtype])
    out = poisoned(3, 16, dtype=dtype)
    quant_norm_linear_silu_mul(out, x, gain, 1e-5, weight.matrix(16))
    truth = silu_truth(x, gain, 1e-5, matrix)
    torch.testing.assert_close(out.double(), truth, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_qkv(kind: Format, dtype: torch.dtype, generator: torch.Generator) -> None:
    heads = (3, 1, 16)
    weight = random_weight(kind, 80, 64, generator)
    case = qkv_case(3, heads, 64, dtype, generator)
    x, gain, eps, _, *places = case.inputs
    made = case.blank()
    quant_norm_qkv_rope_append(*made, x, gain, eps, weight.matrix(8), *places)
    exact = (x, gain, eps, weight.dequantize(torch.float32), *places)
    truths = qkv_truth(dataclasses.replace(case, inputs=exact))
    for mine, truth in zip(made, truths, strict=True):
        torch.testing.assert_close(mine.double(), truth, equal_nan=True, **CLOSE[dtype])


@pytest.mark.parametrize("whole", [0, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_layers_are_those_of_the_dequantised_weights(
    kind: Format, whole: int, generator: torch.Generator
) -> None:
    layers = Layers(kind, torch.float32, generator, whole=whole)
    rows = layers.random(70, HIDDEN)
    made = layers.run(rows, quantised=True)
    assert made.isfinite().all()
    assert torch.equal(made, layers.run(rows, quantised=False))


def test_what_the_kernels_take() -> None:
    cpu = torch.device("cpu")
    assert most_rows(4096, 11008, cpu, packed=True) == 16
    assert most_rows(16, 64, cpu, packed=False) == 8
    assert most_rows(24, 64, cpu, packed=True) == 0
    assert most_rows(16, 96, cpu, packed=False) == 0
    assert most_rows(16, 16448, cpu, packed=True) == 0
